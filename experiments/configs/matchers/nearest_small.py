label = "nearest, small CNN layer3.1"
model = dict(type="nearest", backbone="resnet_small", layers=(6,), input_size=256)
batch = 8
