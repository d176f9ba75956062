dataset = dict(type="folder", split="test")
