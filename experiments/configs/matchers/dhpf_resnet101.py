label = "DHPF, ResNet-101"
checkpoints = dict(  # the authors' files; they hold no trunk, which is ImageNet's
    spair="dhpf/spair.pt", pfpascal="dhpf/pfpascal.pt", pfwillow="dhpf/pfpascal.pt"
)
model = dict(type="dhpf", backbone="resnet101")
batch = 1  # pairs are matched one by one
