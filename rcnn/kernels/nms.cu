// Greedy non-maximum suppression of many independent problems, whose boxes lie by falling score.
//
// nms_padded   grid (Q, slices), block 32..THREADS: one chunk of CHUNK boxes of each problem of a padded batch
// nms_batched  grid (slots, slices), block likewise: one chunk of each range of one list
// nms_ranges   grid ceil(N / THREADS): finds the ranges of equal group, in three lists by size
//
// A block keeps the boxes of its chunk in shared memory, alike ones side by side: each gets a place by a counting sort
// of its size and position, and a row, its rank by score, knows its place until it is struck. The 32 boxes of a word
// have common bounds. The block repeats:
//   1. the next GROUP rows that stand are gathered;
//   2. they are settled: the warps make, by ballots, for each box the set of earlier ones that overlap it, and repeat
//      keep = {boxes that no box of keep overlaps} to its fixed point. It is the greedy answer, because a box can only
//      be struck by an earlier one; clustered boxes need two or three rounds, not 64;
//   3. each word is compared with those of the newly kept that its bounds do not rule out.
// So no pair with a box that was struck by an earlier group is looked at, nor most pairs of boxes far apart or of
// different size; there is no bit matrix, and what is beyond `most` is never settled. Places only say which pairs are
// looked at: the result does not depend on them. A problem of SMALL boxes or fewer is left to one warp, unsorted.
//
// A problem of more than CHUNK boxes takes a launch per chunk. From the second on, each slice compares the chunk with
// its share of all boxes kept before, and the block that arrives last settles what stood against all of them. No
// block waits for another. The extra memory is CHUNK bits per problem.
//
// Source: the rule of torchvision's nms. Its kernel writes a bit for each pair and then passes one box at a time.

#include "box.cuh"
#include "nms.cuh"
#include "scalar.cuh"

#define CHUNK_WORDS (CHUNK / 32)
#define REARRANGE 512  // Fewer places are cheaper left as they are
#define NONE 0xffffu

static_assert(GROUP == 64, "each lane has two boxes of the group");
static_assert(BUCKETS == 32 * 32, "nms_arrange sums 32 rows of 32");
static_assert(CHUNK < NONE, "a place is 16 bits");

// Boxes that strike later ones, and their rows.
struct NmsGroup {
    alignas(16) float boxes[4 * GROUP];
    float limits[GROUP];
    unsigned short rows[GROUP];
};

// What the 32 boxes of each word have in common, those that can overlap none left out: all lie inside `bounds`; the
// least limit and the greatest room. Bits of those that stand; some that are settled may be among them. Only the warp
// that owns a word, always the same one, touches these.
struct NmsWords {
    alignas(16) float bounds[4 * CHUNK_WORDS];
    alignas(8) float reach[2 * CHUNK_WORDS];
    unsigned stands[CHUNK_WORDS];
};

// While boxes are arranged, how many each bucket has; later nms_settle's sets.
union NmsScratch {
    int counts[BUCKETS];
    unsigned long long columns[GROUP];
};

// Two boxes of the group, lane and lane + 32.
struct NmsPair {
    Box low, high;
    float low_limit, high_limit;
};

// A chunk in shared memory. place[row] is where the box of a row lies, NONE from when it does not stand; row[place].
struct NmsChunk {
    float* boxes;
    unsigned short *place, *row;
    NmsGroup* group;
    NmsWords* words;
    NmsScratch* scratch;
    int* standing;  // how many rows behind the group stand
    int warps;      // that work on it; one has no need of barriers
};

__device__ __forceinline__ void nms_sync(const NmsChunk& c) {
    if (c.warps == 1) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}

// Bounds and reach of a word, of which this lane has a box. Eight values are reduced at once: at each of three steps a
// lane gives half of what it has for the other half of its partner's, and keeps what lane / 4 names.
__device__ __forceinline__ void nms_bound(const Box& b, bool there, float fraction, NmsWords& words, int word) {
    const int lane = threadIdx.x % 32;
    const bool solid = there && nms_solid(b);
    const float limit = nms_limit(b, fraction);
    const bool known = limit >= 0.0f;
    const float room = known ? box_area(b) * (1.0f + 0x1p-20f) - limit : INF;
    float v[8] = {b.x1, b.y1, -b.x2, -b.y2, known ? limit : 0.0f, -room, INF, INF};
#pragma unroll
    for (int k = 0; k < 6; ++k) v[k] = solid ? v[k] : INF;
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
        const bool upper = lane & 4 * half;
#pragma unroll
        for (int k = 0; k < half; ++k) {
            const float other = __shfl_xor_sync(WARP_MASK, upper ? v[k] : v[k + half], 4 * half);
            v[k] = fminf(upper ? v[k + half] : v[k], other);
        }
    }
    v[0] = fminf(v[0], __shfl_xor_sync(WARP_MASK, v[0], 2));
    v[0] = fminf(v[0], __shfl_xor_sync(WARP_MASK, v[0], 1));
    const int which = lane / 4;
    const float value = 0x2c >> which & 1 ? -v[0] : v[0];
    if (lane % 4 == 0 && which < 4) words.bounds[4 * word + which] = value;
    if (lane % 4 == 0 && which / 2 == 2) words.reach[2 * word + which - 4] = value;
}

// Puts the finite ones of at most SMALL boxes where their rows are, by one warp; gives the number of places.
__device__ __forceinline__ int nms_copy(const float* boxes, int size, const NmsChunk& c) {
    const int lane = threadIdx.x % 32;
    int standing = 0;
#pragma unroll 1
    for (int base = 0; base < size; base += 32) {
        const int row = base + lane;
        bool stands = row < size;
        if (stands) {
            const Box b = load_box(boxes, row);
            store_box(c.boxes, row, b);
            stands = box_finite(b);
            c.place[row] = static_cast<unsigned short>(stands ? row : NONE);
            c.row[row] = static_cast<unsigned short>(row);
        }
        const unsigned bits = __ballot_sync(WARP_MASK, stands);
        if (lane == 0) c.words->stands[base / 32] = bits;
        standing += __popc(bits);
    }
    if (lane == 0) *c.standing = standing;
    __syncwarp();
    return size;
}

// Puts the boxes of all rows from `from` on that stand, at first all finite ones, side by side, ordered by bucket,
// inside a bucket by chance; gives their number. Starts with a barrier; a barrier is due before `place` is read.
__device__ __forceinline__ int nms_arrange(const float* boxes, int first, int from, int size, bool anew,
                                           float fraction, const NmsChunk& c) {
    __shared__ int sums[32], extent_bits[4];
    int* const counts = c.scratch->counts;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, threads = blockDim.x;
#pragma unroll 1
    for (int i = thread; i < BUCKETS; i += threads) counts[i] = 0;
    if (anew && thread < 4) extent_bits[thread] = 0x7fffffff;
    __syncthreads();
    if (anew) {
        float least[4] = {INF, INF, INF, INF};
#pragma unroll 1
        for (int base = thread; base < size; base += 4 * threads) {
            // Four reads on their way at a time.
            Box b[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) b[k] = load_box(boxes, first + min(base + k * threads, size - 1));
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int row = base + k * threads;
                const bool finite = box_finite(b[k]), solid = finite && nms_solid(b[k]);
                if (row < size) c.place[row] = static_cast<unsigned short>(finite ? 0u : NONE);
                least[0] = fminf(least[0], solid ? b[k].x1 : INF), least[1] = fminf(least[1], solid ? b[k].y1 : INF);
                least[2] = fminf(least[2], solid ? -b[k].x2 : INF), least[3] = fminf(least[3], solid ? -b[k].y2 : INF);
            }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            for (int step = 16; step > 0; step /= 2)
                least[k] = fminf(least[k], __shfl_xor_sync(WARP_MASK, least[k], step));
            if (lane == 0) atomicMin(&extent_bits[k], nms_ordered(__float_as_int(least[k])));
        }
        __syncthreads();
    }
    const NmsExtent extent = nms_extent(extent_bits);
#pragma unroll 1
    for (int row = from + thread; row < size; row += threads)
        if (c.place[row] != NONE) atomicAdd(&counts[nms_bucket(load_box(boxes, first + row), extent)], 1);
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < 32; i += c.warps) {
        int total;
        const int before = nms_sum_before(counts[32 * i + lane], &total);
        counts[32 * i + lane] = before;
        if (lane == 0) sums[i] = total;
    }
    __syncthreads();
    int places;
    const int start = nms_sum_before(sums[lane], &places);
#pragma unroll 1
    for (int base = from + 32 * warp; base < size; base += threads) {
        const int row = base + lane;
        const bool stands = row < size && c.place[row] != NONE;
        Box b = {0.0f, 0.0f, 0.0f, 0.0f};
        int bucket = 0;
        if (stands) {
            b = load_box(boxes, first + row);
            bucket = nms_bucket(b, extent);
        }
        const int offset = __shfl_sync(WARP_MASK, start, bucket / 32);
        if (!stands) continue;
        const int place = offset + atomicAdd(&counts[bucket], 1);
        store_box(c.boxes, place, b);
        c.place[row] = static_cast<unsigned short>(place);
        c.row[place] = static_cast<unsigned short>(row);
    }
    __syncthreads();
#pragma unroll 1
    for (int word = warp; 32 * word < places; word += c.warps) {
        const int place = 32 * word + lane;
        nms_bound(load_box(c.boxes, min(place, places - 1)), place < places, fraction, *c.words, word);
        const unsigned bits = __ballot_sync(WARP_MASK, place < places);
        if (lane == 0) c.words->stands[word] = bits;
    }
    if (thread == 0) *c.standing = places;
    return places;
}

// Makes the next boxes that stand the group, by one warp; gives their number, and puts the row behind them in cursor.
__device__ __forceinline__ int nms_gather(int* cursor, int size, float fraction, const NmsChunk& c) {
    const int lane = threadIdx.x % 32;
    int found = 0, base = *cursor;
    unsigned place = base + lane < size ? c.place[base + lane] : NONE;
#pragma unroll 1
    while (base < size && found < GROUP) {
        const int row = base + lane;
        const unsigned next = row + 32 < size ? c.place[row + 32] : NONE;
        const unsigned stand = __ballot_sync(WARP_MASK, place != NONE);
        const int rank = found + __popc(stand & ((1u << lane) - 1u));
        const bool take = place != NONE && rank < GROUP;
        if (take) {
            const Box b = load_box(c.boxes, place);
            store_box(c.group->boxes, rank, b);
            c.group->limits[rank] = nms_limit(b, fraction);
            c.group->rows[rank] = static_cast<unsigned short>(row);
        }
        const unsigned taken = __ballot_sync(WARP_MASK, take);
        found += __popc(taken);
        base += taken == stand ? 32 : 32 - __clz(taken);
        place = next;
    }
    *cursor = min(base, size);
    return found;
}

__device__ __forceinline__ NmsPair nms_pair(const NmsGroup& group, int count) {
    const int lane = threadIdx.x % 32, low = min(lane, count - 1), high = min(lane + 32, count - 1);
    return {load_box(group.boxes, low), load_box(group.boxes, high), group.limits[low], group.limits[high]};
}

// Which of the `head` boxes of the group are kept, to all threads. Holds a barrier.
__device__ __forceinline__ unsigned long long nms_settle(int head, float threshold, const NmsChunk& c) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const NmsPair pair = nms_pair(*c.group, head);
    unsigned long long* const columns = c.scratch->columns;
#pragma unroll 1
    for (int j = warp; j < head; j += c.warps) {
        const Box b = load_box(c.group->boxes, j);
        const float limit = c.group->limits[j];
        unsigned long long column =
            __ballot_sync(WARP_MASK, lane < j && nms_strikes(pair.low, pair.low_limit, b, limit, threshold));
        if (j > 32) {
            const unsigned later = __ballot_sync(
                WARP_MASK, lane + 32 < j && nms_strikes(pair.high, pair.high_limit, b, limit, threshold));
            column |= static_cast<unsigned long long>(later) << 32;
        }
        if (lane == 0) columns[j] = column;
    }
    nms_sync(c);
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

// The first of the boxes of the group from `first` on, of those whose bit is set, that is near; else `near`.
__device__ __forceinline__ int nms_first_near(const NmsGroup& group, int first, unsigned those, const Box& box,
                                              float limit, int near) {
    while (those) {
        const int i = 31 - __clz(static_cast<int>(those));
        those ^= 1u << i;
        // Two at a time, the second perhaps the first again: one waits for memory less often.
        const int j = those ? 31 - __clz(static_cast<int>(those)) : i;
        those &= ~(1u << j);
        const Box a = load_box(group.boxes, first + i), b = load_box(group.boxes, first + j);
        const float limit_a = group.limits[first + i], limit_b = group.limits[first + j];
        if (nms_near(nms_inter(a, box), limit_a + limit)) near = first + i;
        if (nms_near(nms_inter(b, box), limit_b + limit)) near = first + j;
    }
    return near;
}

// Compares the words with those of `count` boxes of the group whose bit is set in `keep`; rows before `cursor` are
// settled.
__device__ __forceinline__ void nms_strike(unsigned long long keep, int count, int cursor, int places, float threshold,
                                           float fraction, const NmsChunk& c) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const NmsPair pair = nms_pair(*c.group, count);
#pragma unroll 1
    for (int word = warp; 32 * word < places; word += c.warps) {
        // Lane 0 alone reads what it writes below: the votes between order no memory.
        const unsigned bits = __shfl_sync(WARP_MASK, lane == 0 ? c.words->stands[word] : 0u, 0);
        if (bits == 0u) continue;
        unsigned low = static_cast<unsigned>(keep), high = static_cast<unsigned>(keep >> 32);
        if (c.warps > 1) {
            const Box bounds = load_box(c.words->bounds, word);
            const float2 reach = reinterpret_cast<const float2*>(c.words->reach)[word];
            low &= __ballot_sync(WARP_MASK, nms_reaches(pair.low, pair.low_limit, bounds, reach));
            high &= __ballot_sync(WARP_MASK, nms_reaches(pair.high, pair.high_limit, bounds, reach));
        }
        if ((low | high) == 0u) continue;
        const int place = min(32 * word + lane, places - 1), row = c.row[place];
        const Box box = load_box(c.boxes, place);
        const float limit = nms_limit(box, fraction);
        int near = nms_first_near(*c.group, 32, high, box, limit, GROUP);
        near = nms_first_near(*c.group, 0, low, box, limit, near);
        const bool stands = (bits >> lane & 1u) && row >= cursor;
        // The first near one decides nearly always; those after it are asked where it lies just below the threshold.
        bool struck = false;
        for (int i = stands ? near : GROUP; i < GROUP && !struck; ++i)
            struck = keep >> i & 1ull &&
                     nms_strikes(load_box(c.group->boxes, i), c.group->limits[i], box, limit, threshold);
        if (struck) c.place[row] = NONE;
        const unsigned left = __ballot_sync(WARP_MASK, stands && !struck);
        const unsigned fallen = __ballot_sync(WARP_MASK, struck);
        if (lane == 0) c.words->stands[word] = left;
        if (lane == 0 && fallen) atomicSub(c.standing, __popc(fallen));
    }
}

// Strikes the chunk by a slice's share of the `total` boxes kept in earlier launches. Ends with a barrier.
__device__ __forceinline__ void nms_strike_by_kept(const float* boxes, const long long* kept, int total,
                                                   int origin, int places, float threshold, float fraction,
                                                   const NmsChunk& c) {
    const int thread = threadIdx.x, threads = blockDim.x, slice = blockIdx.y, slices = gridDim.y;
    const int end = static_cast<int>(static_cast<long long>(total) * (slice + 1) / slices);
#pragma unroll 1
    for (int base = static_cast<int>(static_cast<long long>(total) * slice / slices); base < end; base += threads) {
        // Each thread reads one of them, all at the same time.
        Box mine = {0.0f, 0.0f, 0.0f, 0.0f};
        if (base + thread < end) mine = load_box(boxes, static_cast<int>(kept[base + thread] - origin));
#pragma unroll 1
        for (int first = 0; first < min(threads, end - base); first += GROUP) {
            const int count = min(GROUP, min(threads, end - base) - first);
            __syncthreads();
            if (thread >= first && thread < first + count) {
                store_box(c.group->boxes, thread - first, mine);
                c.group->limits[thread - first] = nms_limit(mine, fraction);
            }
            __syncthreads();
            nms_strike(~0ull >> (GROUP - count), count, 0, places, threshold, fraction, c);
        }
    }
    __syncthreads();
}

// Leaves the rows standing that stand against all slices, in the block that arrives last; gives false in the others.
// Only atomics touch what other blocks of this launch touch.
__device__ __forceinline__ bool nms_meet(int size, int* standing, int* arrived, const NmsChunk& c) {
    const int thread = threadIdx.x, lane = thread % 32, slices = gridDim.y;
#pragma unroll 1
    for (int base = thread - lane; base < size; base += blockDim.x) {
        const unsigned bits = __ballot_sync(WARP_MASK, base + lane < size && c.place[base + lane] != NONE);
        if (lane == 0) atomicAnd(&standing[base / 32], static_cast<int>(bits));
    }
    __threadfence();
    __syncthreads();
    if (!__syncthreads_or(thread == 0 && atomicAdd(arrived, 1) == slices - 1)) return false;
    __threadfence();
#pragma unroll 1
    for (int base = thread - lane; base < size; base += blockDim.x) {
        const int mine = lane == 0 ? atomicExch(&standing[base / 32], -1) : 0;
        const unsigned bits = static_cast<unsigned>(__shfl_sync(WARP_MASK, mine, 0));
        if (base + lane < size && !(bits >> lane & 1u)) c.place[base + lane] = NONE;
    }
    if (thread == 0) atomicExch(arrived, 0);
    return true;
}

// Rows first .. first + CHUNK of one problem of `rows` boxes.
//
// kept: rows of the problem, plus origin, in rising order; at most `most`. found (problems): how many.
// standing (problems, CHUNK_WORDS), all bits set, and arrived (problems), 0: used where first > 0, left as they were.
// capacity: min(CHUNK, most boxes that any problem of the launch has); shared memory has 20 bytes for each. A block has
// one warp where it is at most SMALL, else more.
__device__ __forceinline__ void nms_chunk(const float* boxes, int rows, int most, int origin, int first,
                                          int capacity, float threshold, long long* kept, long long* found,
                                          int* standing, int* arrived) {
    DYNAMIC_SHARED(float, memory);
    __shared__ NmsGroup group;
    __shared__ NmsWords words;
    __shared__ NmsScratch scratch;
    __shared__ int standing_rows, heads, cursors;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, problem = blockIdx.x;
    const int size = min(rows - first, capacity);
    int total = first > 0 ? static_cast<int>(found[problem]) : 0;
    // The same for all slices of a problem: the last of them writes found after all have read it.
    if (first > 0 && (size <= 0 || total >= most)) return;
    const bool alone = first == 0 && size <= SMALL;
    if (alone && warp > 0) return;
    unsigned short* const place = reinterpret_cast<unsigned short*>(memory + 4 * capacity);
    const int warps = alone ? 1 : blockDim.x / 32;
    const NmsChunk c = {memory, place, place + capacity, &group, &words, &scratch, &standing_rows, warps};
    const float fraction = nms_fraction(threshold);

    int cursor = 0;
    bool met = first == 0;
    while (cursor < size && total < most) {
        const bool anew = cursor == 0 && (first == 0 || !met);
        const int places =
            c.warps == 1 ? nms_copy(boxes, size, c) : nms_arrange(boxes, first, cursor, size, anew, fraction, c);
        if (!met) {
            nms_strike_by_kept(boxes, kept, total, origin, places, threshold, fraction, c);
            if (!nms_meet(size, standing + problem * CHUNK_WORDS, arrived + problem, c)) return;
            met = true;
            continue;
        }
        nms_sync(c);
        while (true) {
            if (warp == 0) {
                const int head = nms_gather(&cursor, size, fraction, c);
                if (lane == 0) heads = head, cursors = cursor, standing_rows -= head;
            }
            nms_sync(c);
            const int head = heads, standing_now = standing_rows;
            cursor = cursors;
            if (head == 0) break;
            const unsigned long long keep = nms_settle(head, threshold, c);
            for (int i = thread; i < head && warp < 2; i += min(32 * c.warps, 64)) {
                const int rank = __popcll(keep & ((1ull << i) - 1ull));
                if (keep >> i & 1ull && total + rank < most) kept[total + rank] = origin + (first + group.rows[i]);
            }
            total += __popcll(keep);
            if (standing_now == 0) cursor = size;
            if (standing_now == 0 || total >= most) break;
            nms_strike(keep, head, cursor, places, threshold, fraction, c);
            nms_sync(c);
            // Where half of them are gone, the others move together.
            if (places > REARRANGE && 2 * standing_now <= places) break;
        }
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
    nms_chunk(boxes + 4 * start, rows, 0x7fffffff, start, first, capacity, threshold, kept + start, found, standing,
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
