// Data races, by the rules and not by luck: built with -fsanitize=thread, whose calls at each read and write come here.
//
// Each thread of a block has a vector clock over the threads of its warp, joined by __syncwarp(), and the block has a
// count of its barriers. Two accesses to a byte by different threads, one of them a write and not both atomic, are a race
// unless one of these barriers stands between them; votes, shuffles and reductions pass values and order no memory (CUDA
// C++ Programming Guide, warp vote and shuffle functions). Between blocks of a launch nothing orders but this: one block has called __threadfence() and then updates a number atomically, another updates it later and calls
// __threadfence(). What the first did before is ordered with what the second does after, if each has a barrier of the
// block, or the same thread, between its part and the atomic.
#pragma once

#include <vector>

namespace emulator {
namespace races {

enum Kind { READ, WRITE, ATOMIC };

#if !defined(__SANITIZE_THREAD__)
static inline void access(const void*, size_t, Kind) {}
static inline void start_launch() {}
static inline void start_block() {}
static inline void block_barrier() {}
static inline void warp_barrier(int, unsigned) {}
static inline void fence() {}
#else

struct Access {
    uint32_t block = 0;  // counted from 1; 0: nobody
    uint16_t thread = 0;
    uint16_t kind = READ;
    uint32_t barriers = 0, clock = 0;
};

// Accesses of one kind that need not be ordered among themselves: the last one, and the last ones before it by another
// thread of its warp, by another warp of its block and by another block. Whatever thread comes next, those of other
// warps since the last barrier are among them, if there are any; within a warp that is so as long as its barriers are of
// the whole warp.
struct Unordered {
    Access last, thread, warp, block;
};

// An atomic does not replace the plain write before it: other threads need not be ordered with both.
struct Byte {
    uintptr_t address = 0;
    Access write;
    Unordered reads, atomics;
};

// An atomic of a block that has called __threadfence(). For the block that runs: with its own fences at that time.
struct Handover {
    uintptr_t address;
    uint32_t block, thread, barriers;
    int fences;
};

static Byte* table;
static size_t capacity, used;
static uint32_t block_number, barriers;
static int fences;
static unsigned clocks[MAX_THREADS][WARP];
static std::vector<Handover> given, taken;

// Tensors of the launch, from the caller: begin and end of each. What lies elsewhere belongs to one fiber or to the
// emulator itself.
static const uint64_t* ranges;
static int range_count;

extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

RUNTIME static bool inside(uintptr_t address, const void* first, const void* last) {
    return address >= reinterpret_cast<uintptr_t>(first) && address < reinterpret_cast<uintptr_t>(last);
}

RUNTIME static bool shared(uintptr_t address) {
    return inside(address, __start_cuda_shared, __stop_cuda_shared) ||
           inside(address, dynamic_memory, dynamic_memory + dynamic_size);
}

RUNTIME static bool watched(uintptr_t address) {
    for (int i = 0; i < range_count; i++)
        if (address >= ranges[2 * i] && address < ranges[2 * i + 1]) return true;
    return shared(address);
}

RUNTIME static Byte* find(uintptr_t address) {
    if (2 * used >= capacity) {
        Byte* old = table;
        const size_t count = capacity;
        capacity = capacity ? 2 * capacity : 1 << 16;
        table = static_cast<Byte*>(calloc(capacity, sizeof(Byte)));
        if (!table) abort();
        used = 0;
        for (size_t i = 0; i < count; i++)
            if (old[i].address) *find(old[i].address) = old[i];
        free(old);
    }
    size_t slot = (address * 0x9e3779b97f4a7c15u) >> 20 & (capacity - 1);
    while (table[slot].address && table[slot].address != address) slot = (slot + 1) & (capacity - 1);
    if (!table[slot].address) {
        table[slot].address = address;
        used++;
    }
    return table + slot;
}

RUNTIME static bool ordered(const Access& before, const Access& after) {
    if (!before.block || (before.kind == ATOMIC && after.kind == ATOMIC)) return true;
    if (before.block != after.block) {
        for (const Handover& from : taken)
            if (from.block == before.block && fences > from.fences &&
                (before.barriers < from.barriers || before.thread == from.thread))
                return true;
        return false;
    }
    if (before.thread == after.thread || before.barriers != after.barriers) return true;
    return before.thread / WARP == after.thread / WARP && clocks[after.thread][before.thread % WARP] > before.clock;
}

RUNTIME static void compare(const Access& before, const Access& after, uintptr_t address) {
    static const char* const names[] = {"reads", "writes", "updates atomically"};
    if (ordered(before, after) || error[0]) return;
    snprintf(error, sizeof error, "a data race: thread %d of block %u %s and thread %d of block %u %s the byte %p with no "
             "barrier between them", before.thread, before.block - 1, names[before.kind], after.thread, after.block - 1,
             names[after.kind], reinterpret_cast<void*>(address));
}

RUNTIME static void compare(const Unordered& before, const Access& after, uintptr_t address) {
    if (!before.last.block) return;
    compare(before.last, after, address);
    compare(before.thread, after, address);
    compare(before.warp, after, address);
    compare(before.block, after, address);
}

RUNTIME static void remember(Unordered& accesses, const Access& current) {
    const Access& last = accesses.last;
    if (last.block != current.block) accesses.block = last;
    else if (last.thread / WARP != current.thread / WARP) accesses.warp = last;
    else if (last.thread != current.thread) accesses.thread = last;
    accesses.last = current;
}

RUNTIME static void access(const void* pointer, size_t size, Kind kind) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(pointer);
    if (!now || !watched(first)) return;
    Access current;
    current.block = block_number;
    current.thread = static_cast<uint16_t>(now->number);
    current.kind = static_cast<uint16_t>(kind);
    current.barriers = barriers;
    current.clock = clocks[now->number][now->number % WARP];
    for (uintptr_t address = first; address < first + size; address++) {
        Byte* byte = find(address);
        compare(byte->write, current, address);
        if (kind != ATOMIC) compare(byte->atomics, current, address);
        if (kind != READ) compare(byte->reads, current, address);
        if (kind == WRITE) byte->write = current;
        else remember(kind == READ ? byte->reads : byte->atomics, current);
    }
    if (kind != ATOMIC) return;
    for (const Handover& from : given)
        if (from.address == first && from.block != block_number) {
            taken.push_back(from);
            taken.back().fences = fences;
        }
    if (fences > 0) given.push_back({first, block_number, current.thread, barriers, fences});
}

RUNTIME static void start_launch() {
    free(table);
    table = nullptr;
    capacity = used = 0;
    block_number = 0;
    given.clear();
}

// Shared memory belongs to a block: what the block before did to the same bytes does not count.
RUNTIME static void start_block() {
    block_number++;
    barriers = fences = 0;
    taken.clear();
    memset(clocks, 0, sizeof clocks);
    for (size_t i = 0; i < capacity; i++)
        if (shared(table[i].address)) table[i].write = Access(), table[i].reads = table[i].atomics = Unordered();
}

RUNTIME static void block_barrier() { barriers++; }

RUNTIME static void fence() { fences++; }

RUNTIME static void warp_barrier(int first, unsigned mask) {
    unsigned joined[WARP] = {};
    for (int lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1)) continue;
        clocks[first + lane][lane]++;
        for (int i = 0; i < WARP; i++) joined[i] = joined[i] > clocks[first + lane][i] ? joined[i] : clocks[first + lane][i];
    }
    for (int lane = 0; lane < WARP; lane++)
        if (mask >> lane & 1) memcpy(clocks[first + lane], joined, sizeof joined);
}

#endif

}  // namespace races
}  // namespace emulator

#if defined(__SANITIZE_THREAD__)
#define RACES_HOOKS(size)                                                                                           \
    RUNTIME void __tsan_read##size(void* p) { emulator::races::access(p, size, emulator::races::READ); }            \
    RUNTIME void __tsan_write##size(void* p) { emulator::races::access(p, size, emulator::races::WRITE); }          \
    RUNTIME void __tsan_unaligned_read##size(void* p) { emulator::races::access(p, size, emulator::races::READ); }  \
    RUNTIME void __tsan_unaligned_write##size(void* p) { emulator::races::access(p, size, emulator::races::WRITE); }\
    RUNTIME void __tsan_volatile_read##size(void* p) { emulator::races::access(p, size, emulator::races::READ); }   \
    RUNTIME void __tsan_volatile_write##size(void* p) { emulator::races::access(p, size, emulator::races::WRITE); }
extern "C" {
RUNTIME void watch(const uint64_t* ranges, int count) {
    emulator::races::ranges = ranges;
    emulator::races::range_count = count;
}
RACES_HOOKS(1) RACES_HOOKS(2) RACES_HOOKS(4) RACES_HOOKS(8) RACES_HOOKS(16)
RUNTIME void __tsan_read_range(void* p, size_t size) { emulator::races::access(p, size, emulator::races::READ); }
RUNTIME void __tsan_write_range(void* p, size_t size) { emulator::races::access(p, size, emulator::races::WRITE); }
RUNTIME void __tsan_func_entry(void*) {}
RUNTIME void __tsan_func_exit() {}
RUNTIME void __tsan_init() {}
}
#endif
