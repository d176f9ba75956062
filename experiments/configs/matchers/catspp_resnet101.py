label = "CATs++, ResNet-101"
checkpoints = dict(  # the authors' files, as they name them
    spair="catspp/spair/model_best.pth",
    pfpascal="catspp/pfpascal/model_best.pth",
    pfwillow="catspp/pfpascal/model_best.pth",
)
model = dict(type="catspp", backbone="resnet101")
batch = 1  # pairs are aggregated one by one
