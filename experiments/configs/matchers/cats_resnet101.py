label = "CATs, ResNet-101"
checkpoints = dict(  # the authors' files, as they name them
    spair="cats/spair/model_best.pth",
    pfpascal="cats/pfpascal/model_best.pth",
    pfwillow="cats/pfpascal/model_best.pth",
)
model = dict(type="cats", backbone="resnet101", layers=(0, 8, 20, 21, 26, 28, 29, 30))
batch = 8
