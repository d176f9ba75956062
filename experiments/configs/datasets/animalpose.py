dataset = dict(type="animalpose", split="test")
