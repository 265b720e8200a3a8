import pytest
import torch


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(0)
    words = [f"w{int(i)}" for i in torch.randint(0, 61, (6000,), generator=generator)]
    path.write_text(" ".join(words))
    return path
