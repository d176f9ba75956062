label = "CATs, tiny"
# trained by `nemf train cats_tiny`
model = dict(type="cats", backbone="resnet_small", layers=(4,), weights="{{ fileDirname }}/../../weights/cats_tiny.pth")
batch = 8
