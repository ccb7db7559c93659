#include "spill_memory.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cassert>
#include <cerrno>
#include <cstdint>
#include <new>
#include <system_error>
#include <utility>

#include "concat.h"
#include "huge_pages.h"

namespace archer_fast {
namespace {

// A file in `folder` that has no name any more.
class NamelessFile {
 public:
  explicit NamelessFile(const std::string& folder) {
    std::string name = folder + "/archer_fast.XXXXXX";
    descriptor_ = ::mkostemp(name.data(), O_CLOEXEC);
    if (descriptor_ < 0) fail(folder, errno);
    ::unlink(name.c_str());
  }
  NamelessFile(const NamelessFile&) = delete;
  NamelessFile& operator=(const NamelessFile&) = delete;
  ~NamelessFile() { ::close(descriptor_); }

  [[noreturn]] static void fail(const std::string& folder, int error) {
    throw std::system_error(error, std::generic_category(), concat("feature_folder: '", folder, "'"));
  }

  // Makes it that long, with room on the disk for every byte.
  void reserve(const std::string& folder, std::size_t bytes) const {
    int error = EINTR;
    while (error == EINTR) error = ::posix_fallocate(descriptor_, 0, static_cast<off_t>(bytes));
    if (error != 0) fail(folder, error);
  }

  // Mapped memory outlives the descriptor.
  std::byte* map(std::size_t bytes) const {
    void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<std::byte*>(memory);
  }

 private:
  int descriptor_;
};

}  // namespace

SpillMemory::SpillMemory(std::size_t max_ram_bytes, std::string folder)
    : max_ram_bytes_(max_ram_bytes), folder_(std::move(folder)) {}

SpillMemory::~SpillMemory() { assert(ram_bytes_ == 0 && mapped_.empty()); }

void* SpillMemory::do_allocate(std::size_t bytes, std::size_t alignment) {
  if (bytes <= max_ram_bytes_ - ram_bytes_) {
    void* const memory = ::operator new(bytes, std::align_val_t{alignment});
    advise_huge_pages(memory, bytes);
    ram_bytes_ += bytes;
    return memory;
  }
  const NamelessFile file(folder_);
  file.reserve(folder_, bytes);
  std::byte* const memory = file.map(bytes);
  try {
    mapped_.emplace(memory, bytes);
  } catch (...) {
    ::munmap(memory, bytes);
    throw;
  }
  ::madvise(memory, bytes, MADV_RANDOM);  // else one row read pulls its neighbours in, and others out
  mapped_bytes_ += bytes;
  return memory;
}

void SpillMemory::do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) noexcept {
  if (mapped_.erase(static_cast<const std::byte*>(memory)) > 0) {
    mapped_bytes_ -= bytes;
    ::munmap(memory, bytes);
  } else {
    ram_bytes_ -= bytes;
    ::operator delete(memory, std::align_val_t{alignment});
  }
}

void SpillMemory::will_need(const std::byte* data, std::size_t bytes) const noexcept {
  const auto behind = mapped_.upper_bound(data);
  if (behind == mapped_.begin() || data >= std::prev(behind)->first + std::prev(behind)->second) return;
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = address / page * page;
  ::madvise(reinterpret_cast<void*>(first), address + bytes - first, MADV_WILLNEED);
}

}  // namespace archer_fast
