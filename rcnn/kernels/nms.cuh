// Which boxes NMS puts side by side, which pairs it has to look at, and which of these strike, with the proofs that
// none is missed. box.cuh comes before; boxes are finite.

#define WARP_MASK 0xffffffffu
#define INF __uint_as_float(0x7f800000u)
#define SURE (1.0f + 0x1p-16f)
#define BUCKETS 1024  // 16 octaves of the area times 8 by 8 cells

__device__ __forceinline__ bool nms_solid(const Box& b) {
    const float area = box_area(b);
    return area > 0.0f && is_finite(area);
}

// The quick tests below compare the intersection with the sum of both boxes' limits, area * fraction. NaN, which asks
// the exact test, for a threshold below that of which they hold.
__device__ __forceinline__ float nms_fraction(float threshold) {
    return threshold < 1e-18f ? __uint_as_float(0x7fc00000u) : threshold / (1.0f + threshold) * (1.0f - 0x1p-18f);
}

// Infinite for a box that overlaps none: its area is not positive, or too large for a float. NaN where the product
// could lose bits to underflow, or the sum of two areas could overflow.
__device__ __forceinline__ float nms_limit(const Box& b, float fraction) {
    const float area = box_area(b), limit = area * fraction;
    if (!(area > 0.0f) || !is_finite(area)) return INF;
    return limit < 1e-30f || area > 1e38f ? __uint_as_float(0x7fc00000u) : limit;
}

// box_intersection, but for the sign of what is not positive.
__device__ __forceinline__ float nms_inter(const Box& a, const Box& b) {
    const float width = fminf(a.x2, b.x2) - fmaxf(a.x1, b.x1);
    const float height = fminf(a.y2, b.y2) - fmaxf(a.y1, b.y1);
    return fmaxf(width, 0.0f) * height;
}

// True wherever nms_suppresses is, and in few other cases, without a division. `limits` is the sum of both.
//
// With e = 2^-24, a union u = fl(fl(a + b) - inter) is at least ((a + b)(1 - e) - inter)(1 - e), so fl(inter / u) > t,
// which needs inter / u > t, means inter > (a + b) * t / (1 + t) * (1 - 2e). The limits add up to less than that: the
// fraction is t / (1 + t) * (1 - 64e) with three roundings, a limit adds one and their sum another, (1 + e)^5 in all.
__device__ __forceinline__ bool nms_near(float inter, float limits) {
    return !(inter <= limits);
}

// True only where nms_suppresses is, and in nearly all of these cases.
//
// The limits add up to at least (a + b) * t / (1 + t) * (1 - 70e), and SURE is 1 + 256e: then inter > (a + b) * t /
// (1 + t) * (1 + 180e), which is inter > t * ((a + b)(1 + 180e) - inter). The union is at most ((a + b)(1 + e) - inter)
// (1 + e), so inter / u > t * (1 + 4e), and the next float after t is at most t * (1 + 2e).
__device__ __forceinline__ bool nms_surely(float inter, float limits) {
    return inter > limits * SURE;
}

__device__ __forceinline__ bool nms_suppresses(const Box& a, const Box& b, float threshold) {
    return box_iou(a, box_area(a), b, box_area(b)) > threshold;
}

__device__ __forceinline__ bool nms_strikes(const Box& a, float limit_a, const Box& b, float limit_b,
                                            float threshold) {
    const float inter = nms_inter(a, b), limits = limit_a + limit_b;
    return nms_surely(inter, limits) || (nms_near(inter, limits) && nms_suppresses(a, b, threshold));
}

// False only if the box is near none of a word. Every operation of nms_inter and the sum of limits rise with their
// operands, so a box's intersection with one of the word is no greater than that with the bounds, and the limits no
// less than with the least limit. It is no greater than that one's area either, so a near one has, with e = 2^-24,
// area >= (limit + its limit)(1 - e): the limit is below its room, area * (1 + 16e) - its limit, rounded twice.
// A NaN limit counts as 0 in the word, with infinite room: IoU > t means inter > a * t / (1 + t) * (1 - 2e) as well.
__device__ __forceinline__ bool nms_reaches(const Box& a, float limit, const Box& bounds, float2 reach) {
    return !(nms_inter(a, bounds) <= limit + reach.x) && !(limit >= reach.y);
}

// The order of ints is that of floats; its own inverse.
__device__ __forceinline__ int nms_ordered(int bits) {
    return bits ^ (bits >> 31 & 0x7fffffff);
}

// Corner of the smallest box around all, cells per unit, exponent of the area.
struct NmsExtent {
    float x1, y1, x_scale, y_scale;
    int octave;
};

__device__ __forceinline__ NmsExtent nms_extent(const int* least) {
    const Box all = {__int_as_float(nms_ordered(least[0])), __int_as_float(nms_ordered(least[1])),
                     -__int_as_float(nms_ordered(least[2])), -__int_as_float(nms_ordered(least[3]))};
    return {all.x1, all.y1, 8.0f / (all.x2 - all.x1), 8.0f / (all.y2 - all.y1), __float_as_int(box_area(all)) >> 23};
}

// Bucket of a box in the extent of all: octave of the area, below it the cell of the centre on a Z-curve, which every
// other octave runs backwards, so that neighbouring buckets are of like boxes. Those that overlap none are the last.
__device__ __forceinline__ int nms_bucket(const Box& b, const NmsExtent& extent) {
    if (!nms_solid(b)) return BUCKETS - 1;
    const int octave = min(max(extent.octave - ((__float_as_int(box_area(b)) + 0x400000) >> 23), 0), 15);
    const float x = (0.5f * b.x1 + 0.5f * b.x2 - extent.x1) * extent.x_scale;
    const float y = (0.5f * b.y1 + 0.5f * b.y2 - extent.y1) * extent.y_scale;
    const int i = static_cast<int>(fminf(fmaxf(x, 0.0f), 7.0f)), j = static_cast<int>(fminf(fmaxf(y, 0.0f), 7.0f));
    const int cell = (i & 1) | (j & 1) << 1 | (i & 2) << 1 | (j & 2) << 2 | (i & 4) << 2 | (j & 4) << 3;
    return 64 * octave + (octave & 1 ? 63 - cell : cell);
}

// Sum of the values of the lanes before this one, and of all.
__device__ __forceinline__ int nms_sum_before(int value, int* total) {
    const int lane = threadIdx.x % 32;
    int sum = value;
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(WARP_MASK, sum, step);
        if (lane >= step) sum += before;
    }
    *total = __shfl_sync(WARP_MASK, sum, 31);
    return sum - value;
}
