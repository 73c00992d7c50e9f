// Checked memory: pointers that can be moved and compared but not dereferenced, and the four
// functions through which a kernel reads and writes.
#pragma once
#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <type_traits>

#include "block.h"

namespace simt {

// A range of global memory that the kernel may touch, or a named slice of one.
struct Buffer {
    std::string name;
    uintptr_t begin, end;
    bool writable;
    Shadow* shadow;  // of the whole range; null if nothing writes it
    uintptr_t shadow_begin;
    Traffic* traffic;
};

// The ranges of one emulator. A pointer made from a bare address belongs to the range around it.
class Buffers {
public:
    Buffer* add(Buffer buffer) { return &*buffers.insert(buffers.end(), std::move(buffer)); }

    const Buffer* find(const void* address) const {
        const auto at = reinterpret_cast<uintptr_t>(address);
        for (const Buffer& buffer : buffers)
            if (buffer.begin <= at && at < buffer.end) return &buffer;
        return nullptr;
    }
    const Buffer* slice(const Buffer* whole, uintptr_t begin, uintptr_t end, const char* name) {
        for (const Buffer& old : slices)
            if (old.begin == begin && old.end == end && old.name == name) return &old;
        Buffer part = *whole;
        part.begin = begin, part.end = end, part.name = name;
        return &*slices.insert(slices.end(), std::move(part));
    }

private:
    std::deque<Buffer> buffers, slices;  // a deque: pointers to elements stay good
};

inline thread_local Buffers* known_buffers = nullptr;  // of the emulator in use

template <typename T> class Global {
public:
    Global() = default;
    Global(std::nullptr_t) {}
    Global(T* pointer) : pointer(pointer), buffer(known_buffers ? known_buffers->find(pointer) : nullptr) {}
    Global(T* pointer, const Buffer* buffer) : pointer(pointer), buffer(buffer) {}
    operator Global<const T>() const { return {pointer, buffer}; }
    explicit operator bool() const { return pointer != nullptr; }

    Global operator+(int64_t n) const { return {pointer + n, buffer}; }
    Global operator-(int64_t n) const { return {pointer - n, buffer}; }
    int64_t operator-(Global other) const { return pointer - other.pointer; }
    Global& operator+=(int64_t n) { return *this = *this + n; }
    Global& operator-=(int64_t n) { return *this = *this - n; }
    Global& operator++() { return *this += 1; }
    friend bool operator==(Global a, Global b) { return a.pointer == b.pointer; }
    friend bool operator!=(Global a, Global b) { return a.pointer != b.pointer; }
    friend bool operator<(Global a, Global b) { return a.pointer < b.pointer; }

    // For the emulator alone.
    T* unchecked() const { return pointer; }
    const Buffer* home() const { return buffer; }

private:
    T* pointer = nullptr;
    const Buffer* buffer = nullptr;
};

// An offset into the block's shared memory.
template <typename T> class Shared {
public:
    Shared() = default;
    explicit Shared(int64_t offset) : bytes(offset) {}
    operator Shared<const T>() const { return Shared<const T>(bytes); }

    Shared operator+(int64_t n) const { return Shared(bytes + n * size); }
    Shared operator-(int64_t n) const { return Shared(bytes - n * size); }
    int64_t operator-(Shared other) const { return (bytes - other.bytes) / size; }
    Shared& operator+=(int64_t n) { return *this = *this + n; }
    Shared& operator-=(int64_t n) { return *this = *this - n; }
    Shared& operator++() { return *this += 1; }
    friend bool operator==(Shared a, Shared b) { return a.bytes == b.bytes; }
    friend bool operator!=(Shared a, Shared b) { return a.bytes != b.bytes; }
    friend bool operator<(Shared a, Shared b) { return a.bytes < b.bytes; }

    int64_t offset() const { return bytes; }

private:
    static constexpr int64_t size = sizeof(T);
    int64_t bytes = 0;
};

template <typename U, typename T> Global<U> cast(Global<T> p) {
    static_assert(std::is_const_v<U> || !std::is_const_v<T>, "cast drops const");
    return {reinterpret_cast<U*>(p.unchecked()), p.home()};
}
template <typename U, typename T> Shared<U> cast(Shared<T> p) {
    static_assert(std::is_const_v<U> || !std::is_const_v<T>, "cast drops const");
    return Shared<U>(p.offset());
}

// `count` elements from `offset` bytes on, under a name of their own: an access that leaves them is
// out of bounds even if it stays inside `whole`.
template <typename U> Global<U> slice(Global<char> whole, size_t offset, size_t count, const char* name) {
    char* start = whole.unchecked() + offset;
    const auto begin = reinterpret_cast<uintptr_t>(start);
    const Buffer* home = whole.home();
    if (home) home = known_buffers->slice(home, begin, begin + count * sizeof(U), name);
    return {reinterpret_cast<U*>(start), home};
}

namespace detail {

inline const char* verb(Use use) {
    return use == Use::load ? "load" : use == Use::store ? "store" : use == Use::hint ? "hint" : "atomic add";
}

[[noreturn]] inline void fail(Kind kind, Site site, const Lane& lane, Use use, size_t bytes, const std::string& address,
                              const std::string& why) {
    lane.block->fail(kind, site, lane, address,
                     std::string(verb(use)) + " of " + std::to_string(bytes) + " bytes " + why);
}

template <Use use> const Stamp* touch(Shadow& shadow, size_t offset, size_t bytes, const Lane& lane, Site site) {
    constexpr Shadow::Note note = use == Use::load    ? &Cell::note_read
                                  : use == Use::store ? &Cell::note_write
                                                      : &Cell::note_atomic;
    return shadow.touch<note>(offset, bytes, lane.view, lane.block->stamp(lane, site));
}

template <Use use, typename T> void check_global(Global<T> p, size_t bytes, Site site) {
    const Buffer* buffer = p.home();
    const auto at = reinterpret_cast<uintptr_t>(p.unchecked());
    const Lane& lane = *running;
    Block& block = *lane.block;
    block.count_step(site);
    const auto address = [&] {
        if (!buffer) return "address " + std::to_string(at);
        return buffer->name + (at < buffer->begin ? " - " : " + ") +
               std::to_string(at < buffer->begin ? buffer->begin - at : at - buffer->begin);
    };
    if (use != Use::hint && !lane.waited)
        fail(Kind::race, site, lane, use, bytes, address(), "before the launch before is over");
    if (!buffer) fail(Kind::out_of_bounds, site, lane, use, bytes, address(), "outside every buffer");
    if (at < buffer->begin || at + bytes > buffer->end)
        fail(Kind::out_of_bounds, site, lane, use, bytes, address(),
             "outside a buffer of " + std::to_string(buffer->end - buffer->begin) + " bytes");
    if (at % bytes != 0) fail(Kind::misaligned, site, lane, use, bytes, address(), "that do not divide the address");
    if (block.options.watch) block.options.watch({block.index, use, at, static_cast<uint32_t>(bytes)});
    if (use == Use::hint) return;
    if (use != Use::load && !buffer->writable)
        fail(Kind::read_only, site, lane, use, bytes, address(), "to a buffer that is only read");
    (use == Use::load    ? buffer->traffic->read
     : use == Use::store ? buffer->traffic->written
                         : buffer->traffic->atomics) += bytes;
    if (!buffer->shadow) return;
    Shadow& shadow = *buffer->shadow;
    const size_t offset = at - buffer->shadow_begin;
    if (const Stamp* other = touch<use>(shadow, offset, bytes, lane, site))
        fail(Kind::race, site, lane, use, bytes, address(), "not ordered after " + block.describe(*other));
    if (use != Use::store && !shadow.valid(offset, bytes))
        fail(Kind::uninitialised, site, lane, use, bytes, address(), "that nobody wrote");
    if (use == Use::store) shadow.set_valid(offset, bytes, true);
}

inline std::string shared_address(int64_t offset) { return "shared + " + std::to_string(offset); }

template <Use use> void check_shared(int64_t at, size_t bytes, const Lane& lane, Site site) {
    Block& block = *lane.block;
    block.count_step(site);
    if (at < 0 || at + bytes > block.shared_bytes)
        fail(Kind::out_of_bounds, site, lane, use, bytes, shared_address(at),
             "outside " + std::to_string(block.shared_bytes) + " bytes of shared memory");
    if (at % bytes != 0)
        fail(Kind::misaligned, site, lane, use, bytes, shared_address(at), "that do not divide the address");
    Shadow& shadow = block.shared_shadow;
    const Stamp writer = shadow.writer(at);
    if (const Stamp* other = touch<use>(shadow, at, bytes, lane, site))
        fail(Kind::race, site, lane, use, bytes, shared_address(at), "not ordered after " + block.describe(*other));
    if (shadow.in_flight(at))
        fail(Kind::copy_in_flight, site, lane, use, bytes, shared_address(at),
             "that the cp.async of " + block.describe(writer) + " still owns");
    if (use != Use::store && !shadow.valid(at, bytes))
        fail(Kind::uninitialised, site, lane, use, bytes, shared_address(at), "that nobody wrote");
    if (use == Use::store) shadow.set_valid(at, bytes, true);
}

template <typename T>
constexpr bool one_access =
    std::is_trivially_copyable_v<T> && (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

}  // namespace detail

template <typename T> std::remove_const_t<T> load_global(Global<T> p, Site site = Site::here()) {
    static_assert(detail::one_access<T>, "an access is 2, 4, 8 or 16 bytes");
    detail::check_global<Use::load>(p, sizeof(T), site);
    std::remove_const_t<T> value;
    std::memcpy(&value, p.unchecked(), sizeof(T));
    return value;
}

template <typename T> void store_global(Global<T> p, std::common_type_t<T> value, Site site = Site::here()) {
    static_assert(detail::one_access<T>, "an access is 2, 4, 8 or 16 bytes");
    detail::check_global<Use::store>(p, sizeof(T), site);
    std::memcpy(p.unchecked(), &value, sizeof(T));
}

template <typename T> std::remove_const_t<T> load_shared(Shared<T> p, Site site = Site::here()) {
    static_assert(detail::one_access<T>, "an access is 2, 4, 8 or 16 bytes");
    Block& block = here();
    detail::check_shared<Use::load>(p.offset(), sizeof(T), *running, site);
    if (block.options.profile) running->warp->requests.add(running->lane, site, "load", p.offset(), sizeof(T));
    std::remove_const_t<T> value;
    std::memcpy(&value, block.shared + p.offset(), sizeof(T));
    return value;
}

template <typename T> void store_shared(Shared<T> p, std::common_type_t<T> value, Site site = Site::here()) {
    static_assert(detail::one_access<T>, "an access is 2, 4, 8 or 16 bytes");
    Block& block = here();
    detail::check_shared<Use::store>(p.offset(), sizeof(T), *running, site);
    if (block.options.profile) running->warp->requests.add(running->lane, site, "store", p.offset(), sizeof(T));
    std::memcpy(block.shared + p.offset(), &value, sizeof(T));
}

inline Shared<char> shared_memory() { return Shared<char>(0); }

}  // namespace simt
