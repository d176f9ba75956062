label = "DINOv2 ViT-B/14, as SD-DINO reads it"
model = dict(type="dinov2_nn", backbone="dinov2_vitb14", readout="sd-dino", input_size=840)
batch = 8
