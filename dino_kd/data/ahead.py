"""Batches on their way to a GPU: the next one is copied while the present one is computed with."""

from __future__ import annotations

from collections.abc import Generator

import torch

from dino_kd.data.crop_maker import CropBatch

Batches = Generator[CropBatch, None, None]


def ahead_on(device: torch.device, batches: Batches) -> Batches:
    """`batches`; on CUDA with their crops on `device`, one ahead of the one that is asked for.

    A hundred megabytes take such a GPU milliseconds, which would otherwise pass between two steps.
    It holds two batches for it, and three while a new one is asked for. From pinned memory (else
    the host waits); what has been rendered on the device passes as it is. Closing this closes
    `batches`.
    """
    return _copied(device, batches) if device.type == "cuda" else batches


def _copied(device: torch.device, batches: Batches) -> Batches:
    stream = torch.cuda.Stream(device)  # beside the one that computes
    under_way: tuple[CropBatch, torch.cuda.Event] | None = None
    try:
        for batch in batches:
            if batch.crops.global_crops.device.type == device.type:
                yield batch
                continue
            following = _sent(batch, device, stream)
            if under_way is not None:
                yield _arrived(*under_way)
            under_way = following
        if under_way is not None:
            yield _arrived(*under_way)
    finally:
        batches.close()


def _sent(
    batch: CropBatch, device: torch.device, stream: torch.cuda.Stream
) -> tuple[CropBatch, torch.cuda.Event]:
    """The batch as it will be on the device, and what tells that it has come."""
    with torch.cuda.stream(stream):
        sent = batch.to(device)
        arrival = torch.cuda.Event()
        arrival.record()
    return sent, arrival


def _arrived(batch: CropBatch, arrival: torch.cuda.Event) -> CropBatch:
    """The batch, for the stream that computes, which waits for it; the host does not."""
    computing = torch.cuda.current_stream()
    computing.wait_event(arrival)
    for crops in (batch.crops.global_crops, batch.crops.local_crops):
        crops.record_stream(computing)  # their memory is free again when that stream is done
    return batch
