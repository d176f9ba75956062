label = "nearest, ResNet-101 layer3.22"
model = dict(type="nearest", backbone="resnet101", layers=(30,), input_size=256)
batch = 8
