// What `manifest.json` says, as far as the loop needs it.
struct Manifest: Decodable {
    struct Weights: Decodable {
        struct Named: Decodable { let name: String }
        let file: String
        let arrays: [Named]
    }

    struct Buffer: Decodable {
        let name: String
        let dtype: String
        let shapes: [[Int]]  // one for each capacity
    }

    struct Argument: Decodable { let name: String }

    struct Function: Decodable {
        let name: String
        let kind: String
        let tokens: Int?  // of the prompt, that it reads
        let room: Int
        let outputs: [Argument]
        let files: [String]  // one for each capacity
    }

    let device: String
    let context: Int
    let vocabulary: Int32
    let stop: [Int32]
    let step: String
    let capacities: [Int]
    let state: [Buffer]
    let functions: [Function]
    let weights: Weights
}
