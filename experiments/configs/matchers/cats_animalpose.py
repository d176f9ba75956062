label = "CATs, ResNet-18 (4,6), trained on AnimalPose"
recipe = "cats_animalpose"  # trained by `nemf train cats_animalpose`
model = dict(type="cats", backbone="resnet18", layers=(4, 6))
batch = 8
