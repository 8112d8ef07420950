// The storage types and the box codec, each alone in a kernel.

#include "box.cuh"
#include "scalar.cuh"

extern "C" __global__ void widen(const scalar* in, float* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = to_float(in[i]);
}

extern "C" __global__ void narrow(const float* in, scalar* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = from_float<scalar>(in[i]);
}

// Twice each value, 16 bytes at a time.
extern "C" __global__ void twice(const scalar* in, scalar* out, int packs) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    float values[Pack<scalar>::size];
    load16(in + i * Pack<scalar>::size, values);
    for (int j = 0; j < Pack<scalar>::size; j++) values[j] *= 2.0f;
    store16(out + i * Pack<scalar>::size, values);
}

extern "C" __global__ void decode(const float* deltas, const float* boxes, float* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float* d = deltas + 4 * i;
    store_box(out, i, box_decode(d[0], d[1], d[2], d[3], load_box(boxes, i), 10.0f, 8.0f, 5.0f, 4.0f));
}

extern "C" __global__ void encode(const float* boxes, const float* targets, float* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float4 d = box_encode(load_box(boxes, i), load_box(targets, i), 10.0f, 8.0f, 5.0f, 4.0f);
    store_box(out, i, {d.x, d.y, d.z, d.w});
}
