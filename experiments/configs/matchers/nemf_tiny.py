label = "NeMF, tiny, 3 iterations"
# trained by `nemf train nemf_tiny`
model = dict(type="nemf", backbone="resnet_small", layers=(4,), feature_size=8, iterations=3, weights="{{ fileDirname }}/../../weights/nemf_tiny.pth")
batch = 1
