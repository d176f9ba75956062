label = "NeMF, small CNN, 10 iterations"
recipe = "nemf_small"  # trained by `nemf train nemf_small`
model = dict(type="nemf", backbone="resnet_small", layers=(4, 6), iterations=10)
batch = 1
