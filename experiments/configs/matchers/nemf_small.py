label = "NeMF, small CNN"
recipe = "nemf_small"  # trained by `nemf train nemf_small`
model = dict(type="nemf", backbone="resnet_small", layers=(4, 6))
batch = 1
