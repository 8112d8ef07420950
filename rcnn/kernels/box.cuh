// Box geometry on the device: the twins of rcnn/boxes.py.
//
// Every function repeats the operations of its twin in the same order, and the sources are compiled with
// --fmad=false, so that areas, IoU and clipped boxes have the same bits as on the CPU. Decoding and encoding call expf
// and logf, whose last bit differs between libraries.
// Boxes are x1, y1, x2, y2 in continuous pixels. Comparisons are written so that NaN passes through, as in torch.

#define MAX_LOG_SCALE 4.135166556742356f  // log(1000 / 16)

struct Box {
    float x1, y1, x2, y2;
};

// Row i of a (N, 4) float32 array that starts on a 16-byte boundary: one load.
__device__ __forceinline__ Box load_box(const float* boxes, int i) {
    const float4 v = reinterpret_cast<const float4*>(boxes)[i];
    return {v.x, v.y, v.z, v.w};
}

__device__ __forceinline__ void store_box(float* boxes, int i, const Box& b) {
    reinterpret_cast<float4*>(boxes)[i] = make_float4(b.x1, b.y1, b.x2, b.y2);
}

__device__ __forceinline__ bool is_finite(float x) {
    return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

__device__ __forceinline__ bool box_finite(const Box& b) {
    return is_finite(b.x1) && is_finite(b.y1) && is_finite(b.x2) && is_finite(b.y2);
}

__device__ __forceinline__ float box_area(const Box& b) {
    return (b.x2 - b.x1) * (b.y2 - b.y1);
}

// Of finite boxes; never negative.
__device__ __forceinline__ float box_intersection(const Box& a, const Box& b) {
    const float width = fminf(a.x2, b.x2) - fmaxf(a.x1, b.x1);
    const float height = fminf(a.y2, b.y2) - fmaxf(a.y1, b.y1);
    return fmaxf(width, 0.0f) * fmaxf(height, 0.0f);
}

// Of finite boxes with their areas; 0 where they do not overlap.
__device__ __forceinline__ float box_iou(const Box& a, float area_a, const Box& b, float area_b) {
    const float inter = box_intersection(a, b);
    return inter > 0.0f ? inter / ((area_a + area_b) - inter) : 0.0f;
}

__device__ __forceinline__ float clip_to(float x, float high) {
    const float above = x < 0.0f ? 0.0f : x;
    if (above > high) return high;
    return above <= high ? above : above + high;  // one of them is NaN
}

// Corners moved into an image of height by width pixels.
__device__ __forceinline__ Box box_clip(const Box& b, float height, float width) {
    return {clip_to(b.x1, width), clip_to(b.y1, height), clip_to(b.x2, width), clip_to(b.y2, height)};
}

// Deltas dx, dy, dw, dh, divided by their weights, applied to a box.
__device__ __forceinline__ Box box_decode(float dx, float dy, float dw, float dh, const Box& b, float wx, float wy,
                                          float ww, float wh) {
    const float width = b.x2 - b.x1, height = b.y2 - b.y1;
    const float center_x = (dx / wx) * width + (b.x1 + 0.5f * width);
    const float center_y = (dy / wy) * height + (b.y1 + 0.5f * height);
    const float log_w = dw / ww, log_h = dh / wh;
    const float half_width = 0.5f * (expf(log_w > MAX_LOG_SCALE ? MAX_LOG_SCALE : log_w) * width);
    const float half_height = 0.5f * (expf(log_h > MAX_LOG_SCALE ? MAX_LOG_SCALE : log_h) * height);
    return {center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height};
}

// Deltas that move box b onto box t, times their weights.
__device__ __forceinline__ float4 box_encode(const Box& b, const Box& t, float wx, float wy, float ww, float wh) {
    const float width = b.x2 - b.x1, height = b.y2 - b.y1;
    const float target_width = t.x2 - t.x1, target_height = t.y2 - t.y1;
    const float center_x = b.x1 + 0.5f * width, center_y = b.y1 + 0.5f * height;
    const float target_x = t.x1 + 0.5f * target_width, target_y = t.y1 + 0.5f * target_height;
    return make_float4(wx * (target_x - center_x) / width, wy * (target_y - center_y) / height,
                       ww * logf(target_width / width), wh * logf(target_height / height));
}
