"""Packed batches with FSDP2: torchrun --nproc-per-node 2 fsdp2_loop.py"""

import ddp_loop
import tiny
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def sharded(model: torch.nn.Module) -> torch.nn.Module:
    """Layer by layer; what the root keeps (embeddings, the head, the vision tower) goes with it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for stack in (model.get_encoder(), model.get_decoder()):
        for layer in stack.layers:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(folder: str = "fsdp2", epochs: int = 6) -> list[float]:
    dist.init_process_group("gloo")
    model = sharded(tiny.model())
    batches = ddp_loop.loader(tiny.samples(), dist.get_rank(), dist.get_world_size())
    losses = ddp_loop.train(model, batches, epochs)
    # every rank gathers, rank 0 writes: the folder is as from a run on one device
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    print(main())
