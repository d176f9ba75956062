label = "HPF, ResNet-18 (4,6)"
model = dict(type="hpf", backbone="resnet18", layers=(4, 6))
batch = 8
