dataset = dict(type="pfpascal", split="test")
