label = "NeMF, ResNet-101"
model = dict(type="nemf", backbone="resnet101", layers=(3, 7, 30, 33))
batch = 1  # pairs are searched one by one
