label = "nearest, ResNet-18 layer3.1"
model = dict(type="nearest", backbone="resnet18", layers=(6,), input_size=256)
batch = 8
