label = "CHM, small CNN"
recipe = "chm_small"  # trained by `nemf train chm_small`
model = dict(type="chm", backbone="resnet_small", input_size=160)
batch = 8
