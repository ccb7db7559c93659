#include <doctest/doctest.h>

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>

#include "spill_memory.h"

namespace {

using archer_fast::SpillMemory;

// An empty folder that goes with the test.
class TestFolder {
 public:
  TestFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "archer_fast_test.XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  TestFolder(const TestFolder&) = delete;
  TestFolder& operator=(const TestFolder&) = delete;
  ~TestFolder() { std::filesystem::remove_all(path_); }

  std::string path() const { return path_.string(); }
  bool is_empty() const { return std::filesystem::is_empty(path_); }

 private:
  std::filesystem::path path_;
};

// Whether the kernel maps `data` from a deleted file of `folder`.
bool is_mapped_from(const std::string& folder, const void* data) {
  std::ifstream maps("/proc/self/maps");
  const auto address = reinterpret_cast<unsigned long>(data);
  for (std::string line; std::getline(maps, line);) {
    unsigned long begin = 0, end = 0;
    std::sscanf(line.c_str(), "%lx-%lx", &begin, &end);
    if (begin <= address && address < end) {
      return line.find(folder + "/archer_fast.") != std::string::npos && line.ends_with("(deleted)");
    }
  }
  return false;
}

}  // namespace

TEST_CASE("pieces lie in RAM up to the limit, then in files without a name, then in RAM again") {
  const TestFolder folder;
  SpillMemory memory(100'000, folder.path());
  void* const first = memory.allocate(60'000, 8);
  void* const second = memory.allocate(40'000, 8);  // exactly the limit
  CHECK(memory.ram_bytes() == 100'000);
  CHECK_FALSE(is_mapped_from(folder.path(), first));
  void* const third = memory.allocate(10'000, 8);
  void* const fourth = memory.allocate(1, 8);
  CHECK(memory.mapped_bytes() == 10'001);
  CHECK(is_mapped_from(folder.path(), third));
  CHECK(is_mapped_from(folder.path(), fourth));
  CHECK(folder.is_empty());
  std::memset(first, 1, 60'000);
  std::memset(second, 2, 40'000);
  std::memset(third, 3, 10'000);
  memory.will_need(static_cast<const std::byte*>(third) + 5'000, 5'000);
  memory.will_need(static_cast<const std::byte*>(first) + 5'000, 5'000);
  CHECK(static_cast<unsigned char*>(third)[9'999] == 3);
  CHECK(static_cast<unsigned char*>(first)[59'999] == 1);

  memory.deallocate(first, 60'000, 8);
  memory.deallocate(third, 10'000, 8);
  CHECK(memory.ram_bytes() == 40'000);
  CHECK(memory.mapped_bytes() == 1);
  void* const fifth = memory.allocate(60'000, 8);
  CHECK_FALSE(is_mapped_from(folder.path(), fifth));
  memory.deallocate(fifth, 60'000, 8);
  memory.deallocate(second, 40'000, 8);
  memory.deallocate(fourth, 1, 8);
  CHECK(memory.ram_bytes() + memory.mapped_bytes() == 0);
}

TEST_CASE("a folder without room, or that is not there, is an error that names it, and nothing is left") {
  const TestFolder folder;
  SpillMemory memory(0, folder.path());
  try {
    static_cast<void>(memory.allocate(std::size_t{1} << 55, 8));
    FAIL("such a disk is not made yet");
  } catch (const std::system_error& error) {
    CHECK((error.code() == std::errc::no_space_on_device || error.code() == std::errc::file_too_large));
    CHECK(std::string(error.what()).starts_with("feature_folder: '" + folder.path() + "': "));
  }
  CHECK(memory.mapped_bytes() == 0);
  CHECK(folder.is_empty());

  SpillMemory elsewhere(0, folder.path() + "/nowhere");
  try {
    static_cast<void>(elsewhere.allocate(1, 8));
    FAIL("there is no such folder");
  } catch (const std::system_error& error) {
    CHECK(error.code() == std::errc::no_such_file_or_directory);
  }
}
