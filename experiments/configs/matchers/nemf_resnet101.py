label = "NeMF, ResNet-101"
checkpoints = dict(  # the authors' files
    spair="nemf/spair/model_best.pth",
    pfpascal="nemf/pfpascal/model_best.pth",
    pfwillow="nemf/pfpascal/model_best.pth",
)
model = dict(type="nemf", backbone="resnet101", layers=(3, 7, 30, 33))
batch = 1  # pairs are searched one by one
