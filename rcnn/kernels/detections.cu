// Detections: softmax, a list of candidates for every image and class, and after NMS one list for every image.
//
// logits (B * P, C) and deltas (B * P, C * 4) of the storage type, C = K + 1 with the background in column 0; proposals
// (B, P, 4). A segment is a foreground class of an image, Q = B * K of them. Each has room for all P proposals, so no
// candidate is ever lost.
//
//   score_classes      grid ceil(B * P / WARPS), a warp per proposal: softmax; scores above the threshold become keys
//                      in the lists of their classes, in any order.
//   decode_candidates  grid (Q, ceil(P / THREADS)): sorted keys to boxes.
//   gather_kept        grid (Q, ceil(R / THREADS)): keys of up to R kept boxes of every class, in any order, to the
//                      list of their image.
//   emit_detections    grid (ceil(D / THREADS), B): sorted keys to detections; decodes the few boxes anew.
//
// A key is the bits of the score, which is positive, above the complement of proposal * C + class: one order for the
// lists of classes and those of images.

#include "scalar.cuh"
#include "box.cuh"

constexpr int WARPS = THREADS / 32;

__device__ __forceinline__ long long append(long long* count) {
    return static_cast<long long>(atomicAdd(reinterpret_cast<unsigned long long*>(count), 1ull));
}

extern "C" __global__ void __launch_bounds__(THREADS)
score_classes(const scalar* __restrict__ logits, const long long* __restrict__ used, long long* __restrict__ keys,
              long long* __restrict__ candidates, int rows, int capacity, int classes, float threshold) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;  // the whole warp, here and below
    const int image = row / capacity, proposal = row % capacity;
    if (proposal >= used[image]) return;
    const scalar* logit = logits + static_cast<long long>(row) * classes;
    float highest = __uint_as_float(0xff800000u);
    for (int c = lane; c < classes; c += 32) highest = fmaxf(highest, to_float(logit[c]));
    for (int step = 16; step > 0; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, step));
    // NaN among the logits, or infinity as their maximum, makes the sum NaN and so every score of the row.
    float sum = 0.0f;
    for (int c = lane; c < classes; c += 32) sum += expf(to_float(logit[c]) - highest);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    for (int c = lane; c < classes; c += 32) {
        const float value = expf(to_float(logit[c]) - highest) / sum;
        if (c == 0 || !(value > threshold)) continue;
        const int segment = image * (classes - 1) + c - 1;
        const unsigned low = ~static_cast<unsigned>(proposal * classes + c);
        keys[segment * static_cast<long long>(capacity) + append(candidates + segment)] =
            static_cast<long long>(__float_as_uint(value)) << 32 | low;
    }
}

// The outputs of the RoI head, and what boxes are made of.
struct Head {
    const scalar* deltas;
    const float *proposals, *image_sizes;
    int capacity, classes;
    float weight_x, weight_y, weight_w, weight_h;
};

// The box of a key, clipped to its image; `unclipped_area` is finite only if all coordinates were.
__device__ __forceinline__ Box decode_key(const Head& head, int image, long long key, float& unclipped_area) {
    const int pair = static_cast<int>(~static_cast<unsigned>(key));  // proposal * classes + class
    const int row = image * head.capacity + pair / head.classes;
    const scalar* delta = head.deltas + 4 * (static_cast<long long>(row) * head.classes + pair % head.classes);
    const Box decoded = box_decode(to_float(delta[0]), to_float(delta[1]), to_float(delta[2]), to_float(delta[3]),
                                   load_box(head.proposals, row), head.weight_x, head.weight_y, head.weight_w,
                                   head.weight_h);
    unclipped_area = box_area(decoded);
    return box_clip(decoded, head.image_sizes[2 * image], head.image_sizes[2 * image + 1]);
}

// A box that is not finite or too small becomes NaN: NMS never keeps it.
extern "C" __global__ void __launch_bounds__(THREADS)
decode_candidates(const scalar* __restrict__ deltas, const float* __restrict__ proposals,
                  const float* __restrict__ image_sizes, const long long* __restrict__ keys,
                  const long long* __restrict__ candidates, float* __restrict__ boxes, int capacity, int classes,
                  float weight_x, float weight_y, float weight_w, float weight_h, float min_size) {
    const int segment = blockIdx.x, i = blockIdx.y * THREADS + threadIdx.x;
    if (i >= candidates[segment]) return;
    const Head head = {deltas, proposals, image_sizes, capacity, classes, weight_x, weight_y, weight_w, weight_h};
    const int place = segment * capacity + i;
    float area;
    Box box = decode_key(head, segment / (classes - 1), keys[place], area);
    if (!(is_finite(area) && box.x2 - box.x1 >= min_size && box.y2 - box.y1 >= min_size)) {
        box.x1 = __uint_as_float(0x7fc00000u);
    }
    store_box(boxes, place, box);
}

extern "C" __global__ void __launch_bounds__(THREADS)
gather_kept(const long long* __restrict__ keys, const long long* __restrict__ keep, const long long* __restrict__ kept,
            long long* __restrict__ gathered, long long* __restrict__ totals, int capacity, int rows, int foreground) {
    const int segment = blockIdx.x, image = segment / foreground, i = blockIdx.y * THREADS + threadIdx.x;
    if (i >= kept[segment]) return;
    const long long first = static_cast<long long>(image) * foreground * rows;
    gathered[first + append(totals + image)] = keys[segment * capacity + keep[segment * rows + i]];
}

extern "C" __global__ void __launch_bounds__(THREADS)
emit_detections(const scalar* __restrict__ deltas, const float* __restrict__ proposals,
                const float* __restrict__ image_sizes, const long long* __restrict__ gathered,
                const long long* __restrict__ totals, float* __restrict__ boxes, float* __restrict__ scores,
                long long* __restrict__ labels, long long* __restrict__ count, int capacity, int classes,
                float weight_x, float weight_y, float weight_w, float weight_h, int list_capacity, int detections) {
    const int image = blockIdx.y, i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= detections) return;
    const int total = static_cast<int>(min(totals[image], static_cast<long long>(detections)));
    if (i == 0) count[image] = total;
    const int row = image * detections + i;
    if (i >= total) {
        store_box(boxes, row, {0.0f, 0.0f, 0.0f, 0.0f});
        scores[row] = 0.0f;
        labels[row] = 0;
        return;
    }
    const Head head = {deltas, proposals, image_sizes, capacity, classes, weight_x, weight_y, weight_w, weight_h};
    const long long key = gathered[static_cast<long long>(image) * list_capacity + i];
    float area;
    store_box(boxes, row, decode_key(head, image, key, area));
    scores[row] = __uint_as_float(static_cast<unsigned>(key >> 32));
    labels[row] = ~static_cast<unsigned>(key) % static_cast<unsigned>(classes);
}
