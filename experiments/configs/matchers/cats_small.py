label = "CATs, small CNN"
recipe = "cats_small"  # trained by `nemf train cats_small`
model = dict(type="cats", backbone="resnet_small", layers=(4, 6))
batch = 8
