label = "SCOT, ResNet-101 (2,22,24,25,27,28,29)"
model = dict(type="scot", backbone="resnet101", layers=(2, 22, 24, 25, 27, 28, 29), exponent=0.5)
batch = 1  # pairs are matched one by one
