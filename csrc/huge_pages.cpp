#include "huge_pages.h"

#include <algorithm>
#include <cstdint>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace archer_fast {
namespace {

class HugePageResource final : public std::pmr::memory_resource {
  static std::align_val_t aligned(std::size_t bytes, std::size_t alignment) noexcept {
    constexpr std::size_t kHugePage = std::size_t{2} << 20;
    return std::align_val_t{bytes >= kHugePage ? std::max(alignment, kHugePage) : alignment};
  }

  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    void* const memory = ::operator new(bytes, aligned(bytes, alignment));
    advise_huge_pages(memory, bytes);
    return memory;
  }

  void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) noexcept override {
    ::operator delete(memory, aligned(bytes, alignment));
  }

  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
};

}  // namespace

std::pmr::memory_resource* huge_page_resource() noexcept {
  static HugePageResource resource;
  return &resource;
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) noexcept {
#ifdef __linux__
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (address + page - 1) / page * page;
  const std::uintptr_t end = (address + bytes) / page * page;
  if (first < end) ::madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace archer_fast
