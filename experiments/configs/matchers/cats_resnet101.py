label = "CATs, ResNet-101"
model = dict(type="cats", backbone="resnet101", layers=(0, 8, 20, 21, 26, 28, 29, 30))
batch = 8
