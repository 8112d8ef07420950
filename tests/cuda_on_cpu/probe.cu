// The functions whose bits are the same on every device, each alone in a kernel, for a look at their PTX and a
// comparison with rcnn/boxes.py.

#include "box.cuh"

extern "C" __global__ void probe_area(const float* a, float* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = box_area(load_box(a, i));
}

extern "C" __global__ void probe_iou(const float* a, const float* b, float* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const Box left = load_box(a, i), right = load_box(b, i);
    out[i] = box_iou(left, box_area(left), right, box_area(right));
}

extern "C" __global__ void probe_clip(const float* a, float* out, float height, float width, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) store_box(out, i, box_clip(load_box(a, i), height, width));
}

// The multiply-adds that one exponential and one logarithm consist of.
extern "C" __global__ void probe_exp(const float* a, float* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = expf(a[i]);
}

extern "C" __global__ void probe_log(const float* a, float* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = logf(a[i]);
}

// What a fused multiply-add looks like.
extern "C" __global__ void probe_fused(const float* a, float* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = fmaf(a[i], a[i], 1.0f);
}
