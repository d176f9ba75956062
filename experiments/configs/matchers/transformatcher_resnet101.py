label = "TransforMatcher, ResNet-101"
recipe = "transformatcher_spair"  # `nemf train transformatcher_spair`; no weights are published
model = dict(type="transformatcher", backbone="resnet101")
batch = 1  # pairs are refined one by one
