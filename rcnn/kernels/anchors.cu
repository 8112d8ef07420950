// Anchors of one pyramid level.
//
// anchor_grid   grid ceil(count / THREADS), block THREADS: a thread writes an anchor, 16 bytes
//
// One launch per level: height, width and stride then travel as numbers, and no table has to be copied to the device,
// which would make the host wait. The result is kept by the launcher, so a training step launches nothing.
//
// cells (A, 4) and out (count, 4) float32, count = height * width * A, by row, column, anchor of the cell.

#include "box.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    anchor_grid(const float* __restrict__ cells, float* __restrict__ out, int count, int per_cell, int width,
                float stride) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    const int place = i / per_cell, y = place / width, x = place - y * width;
    const float* cell = cells + 4 * (i - place * per_cell);
    const float dx = static_cast<float>(x) * stride, dy = static_cast<float>(y) * stride;
    store_box(out, i, {dx + cell[0], dy + cell[1], dx + cell[2], dy + cell[3]});
}
