// Threads of a Metal grid on a processor, one after the other.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace emulator {

// Of the running thread, in its SIMD group.
uint32_t lane();

// Waits for all threads of the group, or of the SIMD group; all have to wait at the same place. `line` is the place.
void group_barrier(int line);
const uint32_t* tell(uint32_t value, int line); // the values of all threads of the SIMD group

struct Matrices {
    float a[64], b[64];
};
const Matrices* tell(float a0, float a1, float b0, float b1, int line); // two elements of each from every thread

// Where a thread is.
struct Place {
    uint32_t group, groups, thread, threads;
};

// A kernel, with its arguments in memory: `words` are those of buffer 0.
typedef void (*Call)(void (*kernel)(), const Place& place, const void* words, void* const* buffers);

struct Kernel {
    const char* name;
    void (*function)();
    Call call;
    size_t words; // bytes of buffer 0
    size_t buffers;

    static Kernel* first;
    Kernel* next;
};

template <size_t... I>
struct Indices {};
template <size_t N, size_t... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <size_t... I>
struct Count<0, I...> {
    typedef Indices<I...> All;
};

template <typename Words, typename... Buffers>
struct Adapter {
    typedef void (*Function)(uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, Words&, Buffers*...);

    template <size_t... I>
    static void with(Function function, const Place& place, const void* words, void* const* buffers, Indices<I...>) {
        Words copy = *static_cast<const Words*>(words);
        function(place.group, place.groups, place.thread, place.threads, place.thread % 32, place.thread / 32,
                 copy, static_cast<Buffers*>(buffers[I])...);
    }
    static void call(void (*kernel)(), const Place& place, const void* words, void* const* buffers) {
        with(reinterpret_cast<Function>(kernel), place, words, buffers, typename Count<sizeof...(Buffers)>::All());
    }
};

// Makes a kernel known by its name.
struct Known : Kernel {
    template <typename Words, typename... Buffers>
    Known(const char* with_name,
          void (*with)(uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, Words&, Buffers*...)) {
        name = with_name;
        function = reinterpret_cast<void (*)()>(with);
        call = Adapter<Words, Buffers...>::call;
        words = sizeof(Words);
        buffers = sizeof...(Buffers);
        next = first;
        first = this;
    }
};

} // namespace emulator
