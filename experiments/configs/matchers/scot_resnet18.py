label = "SCOT without class maps, ResNet-18 (4,6)"
model = dict(type="scot", backbone="resnet18", layers=(4, 6), exponent=0.5, classmap=False)
batch = 8
