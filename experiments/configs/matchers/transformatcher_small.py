label = "TransforMatcher, small CNN (trained, too)"
recipe = "transformatcher_small"  # trained by `nemf train transformatcher_small`
model = dict(
    type="transformatcher", backbone="resnet_small", layers=(3, 4, 5, 6), input_size=160
)
batch = 8
