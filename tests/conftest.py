"""Settings that every test shares."""

import hypothesis
import torch

hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("project")
torch.set_num_threads(1)  # tests run side by side, one per core
