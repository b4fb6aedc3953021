// Runs kernels that it is told of on its standard input, each twice: its threads in another order, and with subnormal
// values taken for zeros as devices may. Both have to give the same.

#include "emulator.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>
#if defined(__SSE__)
#include <immintrin.h>
#endif

extern "C" char __start_threadgroup_memory[], __stop_threadgroup_memory[];

namespace emulator {

Kernel* Kernel::first = nullptr;

namespace {

constexpr uint32_t MOST_THREADS = 1024;
constexpr size_t STACK = 256 << 10;

enum State { READY, IN_GROUP_BARRIER, IN_SIMD_BARRIER, DONE };

struct Thread {
    ucontext_t start;
    jmp_buf at;
    bool started;
    State state;
    int line; // where it waits
    Place place;
    uint32_t turn; // of two, so that nobody overwrites what others still read
};

struct Simd {
    uint32_t values[2][32];
    Matrices matrices[2];
    uint32_t waiting;
};

Thread threads[MOST_THREADS];
Simd simds[MOST_THREADS / 32];
char* stacks;
Thread* current;
jmp_buf scheduler;
std::vector<uint32_t> ready;
uint64_t random_state;

struct Job {
    const Kernel* kernel;
    const void* words;
    std::vector<void*> buffers;
} job;

uint32_t random_below(uint32_t end) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return uint32_t(random_state >> 33) % end;
}

void leave(State state, int line) {
    current->state = state, current->line = line;
    if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

void body() {
    job.kernel->call(job.kernel->function, current->place, job.words, job.buffers.data());
    current->state = DONE;
    _longjmp(scheduler, 1);
}

void resume(Thread* thread) {
    current = thread;
    if (_setjmp(scheduler)) return;
    if (thread->started) _longjmp(thread->at, 1);
    thread->started = true;
    setcontext(&thread->start);
}

// An error, if threads wait at different places.
std::string release(uint32_t first, uint32_t end) {
    for (uint32_t i = first; i < end; i++) {
        if (threads[i].state != threads[first].state || threads[i].line != threads[first].line) {
            return "thread " + std::to_string(first) + " waits in line " + std::to_string(threads[first].line) +
                   " for thread " + std::to_string(i) + ", which is elsewhere";
        }
    }
    for (uint32_t i = first; i < end; i++) {
        threads[i].state = READY;
        ready.push_back(i);
    }
    return "";
}

std::string run_group(uint32_t group, uint32_t groups, uint32_t count) {
    memset(__start_threadgroup_memory, 0xff, __stop_threadgroup_memory - __start_threadgroup_memory);
    ready.clear();
    for (uint32_t i = 0; i < count; i++) {
        Thread& thread = threads[i];
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = stacks + i * STACK, thread.start.uc_stack.ss_size = STACK;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, body, 0);
        thread.started = false, thread.state = READY, thread.turn = 0;
        thread.place = {group, groups, i, count};
        ready.push_back(i);
    }
    for (uint32_t i = 0; i < count / 32; i++) simds[i].waiting = 0;
    uint32_t done = 0, waiting = 0;
    while (done < count) {
        if (ready.empty()) {
            if (waiting != count) return "threads wait for others that do not come";
            waiting = 0;
            const std::string error = release(0, count);
            if (!error.empty()) return error;
        }
        std::swap(ready[random_below(uint32_t(ready.size()))], ready.back());
        const uint32_t next = ready.back();
        ready.pop_back();
        resume(&threads[next]);
        const State state = threads[next].state;
        done += state == DONE, waiting += state == IN_GROUP_BARRIER;
        if (state == IN_SIMD_BARRIER && ++simds[next / 32].waiting == 32) {
            simds[next / 32].waiting = 0;
            const std::string error = release(next / 32 * 32, next / 32 * 32 + 32);
            if (!error.empty()) return error;
        }
    }
    return "";
}

void flush_subnormals(bool flush) {
#if defined(__SSE__)
    _mm_setcsr(flush ? _mm_getcsr() | 0x8040 : _mm_getcsr() & ~0x8040u);
#else
    (void)flush;
#endif
}

std::string run(uint32_t groups, uint32_t count, bool again) {
    random_state = again ? 0x9e3779b97f4a7c15 : 0x2545f4914f6cdd1d;
    flush_subnormals(again);
    std::string error;
    for (uint32_t i = 0; i < groups && error.empty(); i++) {
        error = run_group(again ? groups - 1 - i : i, groups, count);
    }
    flush_subnormals(false);
    return error;
}

// Memory with pages around that nothing may touch. It starts at a multiple of 16, and ends as late as that allows.
class Guarded {
public:
    explicit Guarded(size_t size) : len(size) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), rounded = (size + 15) / 16 * 16;
        all = (rounded + page - 1) / page * page + 2 * page;
        base = static_cast<char*>(mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base == MAP_FAILED) abort();
        start = base + all - page - rounded;
        memset(base, 0xff, all - page);
        mprotect(base, page, PROT_NONE);
        mprotect(base + all - page, page, PROT_NONE);
        margin = start - base - page;
    }
    ~Guarded() { munmap(base, all); }
    Guarded(const Guarded&) = delete;

    bool is_whole() const {
        const size_t behind = (len + 15) / 16 * 16;
        for (size_t i = 0; i < margin; i++) {
            if (start[-ptrdiff_t(i) - 1] != char(0xff)) return false;
        }
        for (size_t i = len; i < behind; i++) {
            if (start[i] != char(0xff)) return false;
        }
        return true;
    }

    char* start;
    const size_t len;

private:
    char* base;
    size_t all, margin;
};

// Messages of 32-bit numbers and bytes.
uint32_t get() {
    uint32_t value;
    if (fread(&value, 4, 1, stdin) != 1) exit(0);
    return value;
}

std::vector<char> get_bytes() {
    std::vector<char> bytes(get());
    if (!bytes.empty() && fread(bytes.data(), bytes.size(), 1, stdin) != 1) exit(1);
    return bytes;
}

void put_bytes(const char* bytes, size_t len) {
    const uint32_t value = uint32_t(len);
    fwrite(&value, 4, 1, stdout);
    fwrite(bytes, 1, len, stdout);
}

struct Binding {
    uint32_t buffer, offset;
};

// What memory holds after a run; an error in `error`.
std::vector<std::vector<char>> once(const std::vector<std::vector<char>>& contents,
                                    const std::vector<Binding>& bindings, uint32_t groups, uint32_t count, bool again,
                                    std::string& error) {
    std::vector<Guarded*> memory;
    for (const std::vector<char>& bytes : contents) {
        memory.push_back(new Guarded(bytes.size()));
        if (!bytes.empty()) memcpy(memory.back()->start, bytes.data(), bytes.size());
    }
    job.buffers.clear();
    for (const Binding& binding : bindings) job.buffers.push_back(memory[binding.buffer]->start + binding.offset);
    error = run(groups, count, again);
    std::vector<std::vector<char>> after;
    for (Guarded* part : memory) {
        if (error.empty() && !part->is_whole()) error = "it wrote around a buffer";
        after.emplace_back(part->start, part->start + part->len);
        delete part;
    }
    return after;
}

std::string differ(const std::vector<std::vector<char>>& a, const std::vector<std::vector<char>>& b) {
    for (size_t i = 0; i < a.size(); i++) {
        for (size_t j = 0; j < a[i].size(); j++) {
            if (a[i][j] != b[i][j]) {
                return "byte " + std::to_string(j) + " of buffer " + std::to_string(i) +
                       " depends on the order of threads, or on whether subnormals are zeros";
            }
        }
    }
    return "";
}

void serve() {
    const std::vector<char> name = get_bytes(), words = get_bytes();
    std::vector<std::vector<char>> contents(get());
    for (std::vector<char>& bytes : contents) bytes = get_bytes();
    std::vector<Binding> bindings(get());
    for (Binding& binding : bindings) binding.buffer = get(), binding.offset = get();
    const uint32_t groups = get(), count = get();

    std::string error;
    const Kernel* kernel = Kernel::first;
    const std::string called(name.data(), name.size());
    while (kernel && kernel->name != called) kernel = kernel->next;
    if (!kernel) {
        error = "there is no such kernel";
    } else if (kernel->words != words.size() || kernel->buffers != bindings.size()) {
        error = "it takes " + std::to_string(kernel->words) + " bytes and " + std::to_string(kernel->buffers) +
                " buffers, not " + std::to_string(words.size()) + " and " + std::to_string(bindings.size());
    } else if (count == 0 || count % 32 != 0 || count > MOST_THREADS) {
        error = std::to_string(count) + " threads are not whole SIMD groups, or too many";
    } else {
        job.kernel = kernel, job.words = words.data();
        const auto first = once(contents, bindings, groups, count, false, error);
        if (error.empty()) {
            const auto second = once(contents, bindings, groups, count, true, error);
            if (error.empty()) error = differ(first, second);
        }
        contents = first;
    }
    put_bytes(error.data(), error.size());
    for (const std::vector<char>& bytes : contents) put_bytes(bytes.data(), bytes.size());
    fflush(stdout);
}

} // namespace

uint32_t lane() { return current->place.thread % 32; }

void group_barrier(int line) { leave(IN_GROUP_BARRIER, line); }

const uint32_t* tell(uint32_t value, int line) {
    Simd& simd = simds[current->place.thread / 32];
    const uint32_t turn = current->turn ^= 1;
    simd.values[turn][lane()] = value;
    leave(IN_SIMD_BARRIER, line);
    return simd.values[turn];
}

const Matrices* tell(float a0, float a1, float b0, float b1, int line) {
    Simd& simd = simds[current->place.thread / 32];
    Matrices& matrices = simd.matrices[current->turn ^= 1];
    matrices.a[2 * lane()] = a0, matrices.a[2 * lane() + 1] = a1;
    matrices.b[2 * lane()] = b0, matrices.b[2 * lane() + 1] = b1;
    leave(IN_SIMD_BARRIER, line);
    return &matrices;
}

} // namespace emulator

int main() {
    using namespace emulator;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<char*>(mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (stacks == MAP_FAILED) abort();
    for (;;) serve();
}
