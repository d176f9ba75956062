label = "DINOv2 ViT-B/14, as the Visual-AI benchmark reads it"
model = dict(type="dinov2_nn", backbone="dinov2_vitb14", readout="nn", input_size=840)
batch = 8
