label = "NC-Net, small CNN"
recipe = "ncnet_small"  # trained by `nemf train ncnet_small`
model = dict(type="ncnet", backbone="resnet_small", input_size=256)
batch = 8
