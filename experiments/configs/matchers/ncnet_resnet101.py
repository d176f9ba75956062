label = "NC-Net, ResNet-101"
recipe = "ncnet_pfpascal"  # trained by `nemf train ncnet_pfpascal`
model = dict(type="ncnet", backbone="resnet101")
batch = 1  # pairs are filtered one by one
