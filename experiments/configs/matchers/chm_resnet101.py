label = "CHM, ResNet-101"
checkpoints = dict(  # the authors' files, as they name them
    spair="chm/spr_psi.pt", pfpascal="chm/pas_psi.pt", pfwillow="chm/pas_psi.pt"
)
model = dict(type="chm", backbone="resnet101")
batch = 1  # pairs are filtered one by one
