"""Counting the gradients that are in memory, from outside the optimizer."""

from torch.multiprocessing.reductions import StorageWeakRef


class LiveGradients:
    """Counts the bytes of gradients that are in memory, each time backward completes one.

    To be made before the optimizer, so that its hooks come first and see each gradient before it is freed. A gradient
    counts until its storage is gone, whoever holds it.
    """

    def __init__(self, model):
        self.storages, self.peak = {}, 0
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self.see)

    def see(self, p):
        storage = p.grad.untyped_storage()
        self.storages[StorageWeakRef(storage)] = storage.nbytes()
        del storage
        self.peak = max(self.peak, self.now())

    def now(self):
        return sum(nbytes for reference, nbytes in self.storages.items() if not reference.expired())


def gradient_bytes(optimizer):
    """Bytes of the gradients by algorithm, and of the largest matrix."""
    sizes = {"multinorm": 0, "adamw": 0}
    for group in optimizer.param_groups:
        sizes[group["algorithm"]] += sum(p.numel() * p.element_size() for p in group["params"])
    matrices = (p for g in optimizer.param_groups if g["algorithm"] == "multinorm" for p in g["params"])
    return {**sizes, "largest": max(p.numel() * p.element_size() for p in matrices)}
