// Greedy non-maximum suppression of many independent problems, whose boxes lie by falling score.
//
// nms_padded   grid (Q, slices), block 32..THREADS: one chunk of CHUNK boxes of each problem of a padded batch
// nms_batched  grid (slots, slices), block likewise: one chunk of each range of one list
// nms_ranges   grid ceil(N / THREADS): finds the ranges of equal group, in three lists by size
//
// A block keeps the boxes of its chunk in shared memory with a list of those that still stand, and repeats:
//   1. the first GROUP boxes of the list are settled: the warps make, by ballots, for each box the set of earlier ones
//      that overlap it, and repeat keep = {boxes that no box of keep overlaps} to its fixed point. It is the greedy
//      answer, because a box can only be struck by an earlier one; clustered boxes need two or three rounds, not 64;
//   2. each later box is compared with the newly kept ones only;
//   3. what still stands moves to the front of the list.
// So no pair with a struck box is looked at twice, there is no bit matrix, and what is beyond `most` is never settled.
//
// A problem of more than CHUNK boxes takes a launch per chunk. From the second on, each slice compares the chunk with
// its share of all boxes kept before, and the block that arrives last settles what stood against all of them. No
// block waits for another. The extra memory is CHUNK bits per problem.
//
// Source: the rule of torchvision's nms. Its kernel writes a bit for each pair and then passes one box at a time.

#include "box.cuh"
#include "scalar.cuh"

#define WARP_MASK 0xffffffffu
#define CHUNK_WORDS (CHUNK / 32)

static_assert(CHUNK_WORDS <= 64, "nms_pack gives two words to each lane");
static_assert(GROUP == 64, "nms_settle gives two boxes to each lane");

// Boxes kept a moment ago, which strike later ones.
struct NmsFresh {
    float boxes[4 * GROUP];
    float limits[GROUP];
};

// The quick test below compares the intersection with the sum of both boxes' limits, area * fraction.
__device__ __forceinline__ float nms_fraction(float threshold) {
    return threshold < 1e-18f ? 0.0f : threshold / (1.0f + threshold) * (1.0f - 0x1p-18f);
}

// Infinite for a box that overlaps none (its area is not positive, or too large for a float); 0, which is no limit,
// where the product could lose bits to underflow.
__device__ __forceinline__ float nms_limit(const Box& b, float fraction) {
    const float area = box_area(b), limit = area * fraction;
    if (!(area > 0.0f) || !is_finite(area)) return __uint_as_float(0x7f800000u);
    return limit < 1e-30f ? 0.0f : limit;
}

// True wherever nms_suppresses is, and in few other cases, without a division.
//
// With e = 2^-24, a union u = fl(fl(a + b) - inter) is at least ((a + b)(1 - e) - inter)(1 - e), so fl(inter / u) > t,
// which needs inter / u > t, means inter > (a + b) * t / (1 + t) * (1 - 2e). The limits add up to less than that: the
// fraction is t / (1 + t) * (1 - 64e) with three roundings, a limit adds one and their sum another, (1 + e)^5 in all.
// Where a + b or the sum of the limits overflows, the union does, and the IoU is 0.
__device__ __forceinline__ bool nms_near(const Box& a, float limit_a, const Box& b, float limit_b) {
    const float width = fminf(a.x2, b.x2) - fmaxf(a.x1, b.x1);
    const float height = fminf(a.y2, b.y2) - fmaxf(a.y1, b.y1);
    return fmaxf(width, 0.0f) * height > limit_a + limit_b;
}

__device__ __forceinline__ bool nms_suppresses(const Box& a, const Box& b, float threshold) {
    return box_iou(a, box_area(a), b, box_area(b)) > threshold;
}

// Moves the rows whose bit is set in `stands` to `to`, in order; gives their number to all threads. `from` is null for
// the list 0, 1, 2, ... Starts and ends with a barrier: `stands` and `from` were just written, `to` is read next.
__device__ __forceinline__ int nms_pack(const unsigned* stands, int words, const unsigned short* from,
                                        unsigned short* to) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();
    const int even = 2 * lane < words ? __popc(stands[2 * lane]) : 0;
    const int odd = 2 * lane + 1 < words ? __popc(stands[2 * lane + 1]) : 0;
    int sum = even + odd;
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(WARP_MASK, sum, step);
        if (lane >= step) sum += before;
    }
    for (int word = warp; word < words; word += warps) {
        const int start = __shfl_sync(WARP_MASK, word % 2 ? sum - odd : sum - odd - even, word / 2);
        const unsigned bits = stands[word];
        const int p = 32 * word + lane;
        if (bits >> lane & 1u)
            to[start + __popc(bits & ((1u << lane) - 1u))] = static_cast<unsigned short>(from ? from[p] : p);
    }
    __syncthreads();
    return __shfl_sync(WARP_MASK, sum, 31);
}

// Which of the first `head` boxes of the list are kept, to all threads. Holds a barrier.
__device__ __forceinline__ unsigned long long nms_settle(const float* boxes, const unsigned short* list, int head,
                                                         float threshold, float fraction,
                                                         unsigned long long* columns) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Box low = load_box(boxes, list[min(lane, head - 1)]);
    const Box high = load_box(boxes, list[min(lane + 32, head - 1)]);
    const float low_limit = nms_limit(low, fraction), high_limit = nms_limit(high, fraction);
    for (int j = warp; j < head; j += warps) {
        const Box b = load_box(boxes, list[j]);
        const float limit = nms_limit(b, fraction);
        unsigned long long column = __ballot_sync(
            WARP_MASK, lane < j && nms_near(low, low_limit, b, limit) && nms_suppresses(low, b, threshold));
        if (j > 32) {
            const unsigned later = __ballot_sync(WARP_MASK, lane + 32 < j && nms_near(high, high_limit, b, limit) &&
                                                                nms_suppresses(high, b, threshold));
            column |= static_cast<unsigned long long>(later) << 32;
        }
        if (lane == 0) columns[j] = column;
    }
    __syncthreads();
    // Each warp finds the same answer: cheaper than to wait for one that does. After n rounds the first n bits are final.
    const unsigned long long low_column = lane < head ? columns[lane] : 0;
    const unsigned long long high_column = lane + 32 < head ? columns[lane + 32] : 0;
    unsigned long long keep = ~0ull, last;
    do {
        last = keep;
        keep = __ballot_sync(WARP_MASK, lane < head && (low_column & last) == 0);
        const unsigned upper = __ballot_sync(WARP_MASK, lane + 32 < head && (high_column & last) == 0);
        keep |= static_cast<unsigned long long>(upper) << 32;
    } while (keep != last);
    return keep;
}

// Compares N words of 32 boxes of the list, `step` words apart, with the fresh ones; sets the bits of those that stand.
template <int N>
__device__ __forceinline__ void nms_strike(const float* boxes, const unsigned short* list, int length, int word,
                                           int step, const NmsFresh& fresh, int count, float threshold, float fraction,
                                           unsigned* stands) {
    const int lane = threadIdx.x % 32;
    Box box[N];
    float limit[N];
    int near[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        box[n] = load_box(boxes, list[min(32 * (word + n * step) + lane, length - 1)]);
        limit[n] = nms_limit(box[n], fraction);
        near[n] = -1;
    }
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
        const Box b = load_box(fresh.boxes, i);
        const float b_limit = fresh.limits[i];
#pragma unroll
        for (int n = 0; n < N; ++n)
            if (nms_near(b, b_limit, box[n], limit[n])) near[n] = i;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
        // The last near one decides nearly always; those before it are asked where it lies just below the threshold.
        bool struck = false;
        for (int i = near[n]; i >= 0 && !struck; --i)
            struck = nms_suppresses(load_box(fresh.boxes, i), box[n], threshold);
        const int position = 32 * (word + n * step) + lane;
        const unsigned bits = __ballot_sync(WARP_MASK, position < length && !struck);
        if (lane == 0) stands[word + n * step] = bits;
    }
}

// nms_strike for the whole list. Starts with a barrier: `fresh` was just written.
__device__ __forceinline__ void nms_strike_all(const float* boxes, const unsigned short* list, int length,
                                               const NmsFresh& fresh, int count, float threshold, float fraction,
                                               unsigned* stands) {
    const int warps = blockDim.x / 32, words = (length + 31) / 32;
    int word = threadIdx.x / 32;
    __syncthreads();
    // Two boxes a thread share the reads of the fresh ones.
    for (; word + warps < words; word += 2 * warps)
        nms_strike<2>(boxes, list, length, word, warps, fresh, count, threshold, fraction, stands);
    if (word < words) nms_strike<1>(boxes, list, length, word, warps, fresh, count, threshold, fraction, stands);
}

// Rows first .. first + CHUNK of one problem of `rows` boxes.
//
// kept: rows of the problem, plus origin, in rising order; at most `most`. found (problems): how many.
// standing (problems, CHUNK_WORDS), all bits set, and arrived (problems), 0: used where first > 0, left as they were.
// capacity: min(CHUNK, most boxes that any problem of the launch has); shared memory has 20 bytes for each.
__device__ __forceinline__ void nms_chunk(const float* boxes, int rows, int most, long long origin, int first,
                                          int capacity, float threshold, long long* kept, long long* found,
                                          int* standing, int* arrived) {
    DYNAMIC_SHARED(float, chunk);
    __shared__ NmsFresh fresh;
    __shared__ unsigned long long columns[GROUP];
    __shared__ unsigned stands[CHUNK_WORDS];
    unsigned short* list = reinterpret_cast<unsigned short*>(chunk + 4 * capacity);
    unsigned short* other = list + capacity;

    const int thread = threadIdx.x, lane = thread % 32, problem = blockIdx.x;
    const int size = min(rows - first, capacity), words = (size + 31) / 32;
    int total = first > 0 ? static_cast<int>(found[problem]) : 0;
    // The same for all slices of a problem: the last of them writes found after all have read it.
    if (first > 0 && (size <= 0 || total >= most)) return;
    const float fraction = nms_fraction(threshold);

    for (int word = thread / 32; word < words; word += blockDim.x / 32) {
        const int row = 32 * word + lane;
        bool stand = row < size;
        if (stand) {
            const Box b = load_box(boxes, first + row);
            store_box(chunk, row, b);
            stand = box_finite(b);
        }
        const unsigned bits = __ballot_sync(WARP_MASK, stand);
        if (lane == 0) stands[word] = bits;
    }
    int length = nms_pack(stands, words, nullptr, list);

    if (first > 0) {
        // This slice's share of the boxes kept in earlier launches, GROUP at a time.
        const int slice = blockIdx.y, slices = gridDim.y;
        const int end = static_cast<int>(static_cast<long long>(total) * (slice + 1) / slices);
        for (int base = static_cast<int>(static_cast<long long>(total) * slice / slices); base < end && length > 0;
             base += GROUP) {
            const int count = min(GROUP, end - base);
            for (int i = thread; i < count; i += blockDim.x) {
                const Box b = load_box(boxes, static_cast<int>(kept[base + i] - origin));
                store_box(fresh.boxes, i, b);
                fresh.limits[i] = nms_limit(b, fraction);
            }
            nms_strike_all(chunk, list, length, fresh, count, threshold, fraction, stands);
            length = nms_pack(stands, (length + 31) / 32, list, other);
            unsigned short* const swapped = list;
            list = other;
            other = swapped;
        }
        // What stands against all slices. Only atomics touch what other blocks of this launch touch.
        for (int word = thread; word < words; word += blockDim.x) stands[word] = 0u;
        __syncthreads();
        for (int p = thread; p < length; p += blockDim.x) atomicOr(&stands[list[p] / 32], 1u << list[p] % 32);
        __syncthreads();
        for (int word = thread; word < words; word += blockDim.x)
            atomicAnd(&standing[problem * CHUNK_WORDS + word], static_cast<int>(stands[word]));
        __threadfence();
        __syncthreads();
        if (!__syncthreads_or(thread == 0 && atomicAdd(&arrived[problem], 1) == slices - 1)) return;
        __threadfence();
        for (int word = thread; word < words; word += blockDim.x)
            stands[word] = static_cast<unsigned>(atomicExch(&standing[problem * CHUNK_WORDS + word], -1));
        if (thread == 0) atomicExch(&arrived[problem], 0);
        length = nms_pack(stands, words, nullptr, list);
    }

    while (length > 0 && total < most) {
        const int head = min(length, GROUP);
        const unsigned long long keep = nms_settle(chunk, list, head, threshold, fraction, columns);
        for (int i = thread; i < head; i += blockDim.x) {
            if (!(keep >> i & 1ull)) continue;
            const int rank = __popcll(keep & ((1ull << i) - 1ull));
            const Box b = load_box(chunk, list[i]);
            store_box(fresh.boxes, rank, b);
            fresh.limits[rank] = nms_limit(b, fraction);
            if (total + rank < most) kept[total + rank] = origin + first + list[i];
        }
        const int count = __popcll(keep);
        total += count;
        length -= head;
        nms_strike_all(chunk, list + head, length, fresh, count, threshold, fraction, stands);
        length = nms_pack(stands, (length + 31) / 32, list + head, other);
        unsigned short* const swapped = list;
        list = other;
        other = swapped;
    }
    if (thread == 0) found[problem] = min(total, most);
}

// boxes (Q, rows, 4), of which problem q has count[q]; kept (Q, most); found (Q).
extern "C" __global__ void __launch_bounds__(THREADS)
    nms_padded(const float* __restrict__ boxes, const long long* __restrict__ count, int rows, int most, int first,
               int capacity, float threshold, long long* kept, long long* found, int* standing, int* arrived) {
    const int q = blockIdx.x;
    const int used = static_cast<int>(min(max(count[q], 0ll), static_cast<long long>(rows)));
    nms_chunk(boxes + 4 * q * rows, used, most, 0, first, capacity, threshold, kept + q * most, found, standing,
              arrived);
}

// boxes (N, 4); ranges (slots, 2) start and length of each problem, of which *slots are there; kept (N): the rows of
// the list that a problem keeps, from the problem's own start on; found (slots).
extern "C" __global__ void __launch_bounds__(THREADS)
    nms_batched(const float* __restrict__ boxes, const int* __restrict__ ranges, const int* __restrict__ slots,
                int first, int capacity, float threshold, long long* kept, long long* found, int* standing,
                int* arrived) {
    const int slot = blockIdx.x;
    if (slot >= *slots) return;
    const int start = ranges[2 * slot], rows = ranges[2 * slot + 1];
    nms_chunk(boxes + 4 * start, rows, rows, start, first, capacity, threshold, kept + start, found, standing,
              arrived);
}

// group (rows), rising; ranges (3, rows, 2): start and length of each run of equal group, in the list of those of at
// most SMALL, at most CHUNK, and more boxes; slots (3): length of each list, 0 before. The order in a list is left to
// chance and does not matter.
extern "C" __global__ void __launch_bounds__(THREADS)
    nms_ranges(const long long* __restrict__ group, int rows, int* ranges, int* slots) {
    const int start = blockIdx.x * blockDim.x + threadIdx.x;
    if (start >= rows || (start > 0 && group[start] == group[start - 1])) return;
    int end = start + 1, bound = rows;
    while (end < bound) {
        const int middle = end + (bound - end) / 2;
        if (group[middle] == group[start]) {
            end = middle + 1;
        } else {
            bound = middle;
        }
    }
    const int length = end - start, list = (length > SMALL) + (length > CHUNK);
    const int slot = list * rows + atomicAdd(&slots[list], 1);
    ranges[2 * slot] = start;
    ranges[2 * slot + 1] = length;
}
