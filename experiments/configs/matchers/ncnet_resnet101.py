label = "NC-Net, ResNet-101"
checkpoints = dict(  # the authors' files, as they name them
    spair="ncnet/ncnet_pfpascal.pth.tar",
    pfpascal="ncnet/ncnet_pfpascal.pth.tar",
    pfwillow="ncnet/ncnet_pfpascal.pth.tar",
)
model = dict(type="ncnet", backbone="resnet101")
batch = 1  # pairs are filtered one by one
