label = "SCOT, ResNet-101 (0,19,27,28,29,30), as on SPair-71k"
model = dict(type="scot", backbone="resnet101", layers=(0, 19, 27, 28, 29, 30), exponent=1.0)
batch = 1  # pairs are matched one by one
