// As much of JSON as a manifest needs: a reader, no writer.
#pragma once

#include <cctype>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace kvpass {

// A value; asking for what it is not throws std::runtime_error. Numbers are whole or lie within a double.
class Json {
 public:
  static Json parse(std::string_view text) {
    Reader reader{text};
    Json value = reader.value();
    reader.skip();
    if (reader.at != text.size()) reader.fail("the end");
    return value;
  }

  const Json& operator[](const std::string& name) const {
    const auto found = members_.find(name);
    if (found == members_.end()) throw std::runtime_error("the manifest lacks \"" + name + "\"");
    return found->second;
  }
  const std::map<std::string, Json>& members() const { return members_; }
  const std::vector<Json>& items() const { return items_; }
  bool is_null() const { return kind_ == 'n'; }
  const std::string& text() const { return expect('"'), text_; }
  int64_t integer() const { return expect('0'), std::stoll(text_); }
  std::vector<int64_t> integers() const {
    std::vector<int64_t> found;
    for (const Json& item : items_) found.push_back(item.integer());
    return found;
  }

 private:
  struct Reader {
    std::string_view text;
    size_t at = 0;

    [[noreturn]] void fail(const std::string& wanted) const {
      throw std::runtime_error("the manifest is no JSON: expected " + wanted + " at byte " + std::to_string(at));
    }
    void skip() {
      while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) ++at;
    }
    char next() {
      skip();
      if (at == text.size()) fail("more");
      return text[at];
    }
    void take(char wanted) {
      if (next() != wanted) fail(std::string(1, wanted));
      ++at;
    }
    bool took(char wanted) { return next() == wanted ? (++at, true) : false; }

    std::string string() {
      take('"');
      std::string found;
      while (at < text.size() && text[at] != '"') {
        if (text[at] == '\\' && ++at < text.size() && text[at] != '"' && text[at] != '\\' && text[at] != '/') {
          found += '\\';  // other escapes occur in no name that is looked up, and stay as they are
        }
        if (at < text.size()) found += text[at++];
      }
      take('"');
      return found;
    }

    Json value() {
      Json found;
      const char first = next();
      if (first == '{') {
        found.kind_ = '{';
        ++at;
        while (!took('}')) {
          std::string name = string();
          take(':');
          found.members_.emplace(std::move(name), value());
          if (next() != '}') take(',');
        }
      } else if (first == '[') {
        found.kind_ = '[';
        ++at;
        while (!took(']')) {
          found.items_.push_back(value());
          if (next() != ']') take(',');
        }
      } else if (first == '"') {
        found.kind_ = '"';
        found.text_ = string();
      } else {  // a number, true, false, null, or what Python writes for numbers that are none
        while (at < text.size() && (std::isalnum(static_cast<unsigned char>(text[at])) || text[at] == '.' ||
                                    text[at] == '-' || text[at] == '+')) {
          found.text_ += text[at++];
        }
        if (found.text_.empty()) fail("a value");
        found.kind_ = std::isdigit(static_cast<unsigned char>(found.text_.back())) ? '0' : found.text_[0];
      }
      return found;
    }
  };

  void expect(char kind) const {
    if (kind_ != kind) throw std::runtime_error("the manifest holds something else than expected: " + text_);
  }

  char kind_ = 'n';
  std::string text_;
  std::vector<Json> items_;
  std::map<std::string, Json> members_;
};

}  // namespace kvpass
