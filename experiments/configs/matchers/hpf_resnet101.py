label = "HPF, ResNet-101 (2,17,21,22,25,26,28)"
model = dict(type="hpf", backbone="resnet101", layers=(2, 17, 21, 22, 25, 26, 28))
batch = 1  # pairs are voted on one by one
