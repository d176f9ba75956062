label = "CHM, ResNet-101"
recipe = "chm_spair"  # trained by `nemf train chm_spair`
model = dict(type="chm", backbone="resnet101")
batch = 1  # pairs are filtered one by one
