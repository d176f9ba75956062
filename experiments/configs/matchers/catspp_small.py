label = "CATs++, small CNN"
recipe = "catspp_small"  # trained by `nemf train catspp_small`
model = dict(type="catspp", backbone="resnet_small", layers=(3, 4, 5, 6), input_size=256)
batch = 8
